"""Every file of conf/ composes and fits the signature of the class that it configures."""

from collections.abc import Iterator
from itertools import zip_longest

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from unlearning.__main__ import CONF
from unlearning.config import validation
from unlearning.config.signatures import parameters
from unlearning.errors import UserError

FILES = sorted(p.relative_to(CONF).with_suffix("") for p in CONF.glob("**/*.yaml") if p.parent != CONF)
# A specialization is never chosen: it comes with its method and model, and is checked with them.
CHOICES = [str(p) for p in FILES if p.parts[0] != "specialization"]
# Unknown outside of Hydra's own process, or given by the user.
GIVEN = ["paths.output_dir=/nowhere", "title=a test"]
NEEDS = {"dataset/folder": ["forget=/a/folder"]}
TAKES_ANYTHING = {"unlearning.tracking.loggers.wandb"}  # what wandb.init accepts
USUAL = "emoji_unet"  # the main config's model


def names(group: str) -> set[str]:
    return {p.name for p in FILES if str(p.parent) == group and not p.name.startswith("_")}


SPECIALIZED = {
    (model, method)
    for model in names("model")
    for method in names("method")
    if f"{model}_{method}" in names("specialization")
}


def group_and_name(choice: str) -> tuple[str, str]:
    """How a user chooses a file: method=after/relearn, hydra/launcher=slurm."""
    parts = choice.split("/")
    depth = 2 if parts[0] == "hydra" else 1
    return "/".join(parts[:depth]), "/".join(parts[depth:])


def runs() -> list[tuple[str, ...]]:
    """The choices of as many runs as the largest group has files: each run has one file of every group that is left.

    A model, which chooses from other groups itself, comes with a method that has settings for it, or with the usual
    method, whose regularisers it is checked with.
    """
    groups: dict[str, list[str]] = {}
    for choice in CHOICES:
        groups.setdefault(group_and_name(choice)[0], []).append(choice)
    pairs = [(f"model/{model}", f"method/{method}") for model, method in sorted(SPECIALIZED) if model != USUAL]
    alone = [(choice,) for choice in groups.pop("experiment") if choice.count("/") > 1]  # the others: see below
    models = zip_longest(groups.pop("model"), groups.pop("regulariser"))
    return [*pairs, *alone, *(tuple(filter(None, run)) for run in (*models, *zip_longest(*groups.values())))]


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=[*GIVEN, *overrides])


def choose(*choices: str) -> DictConfig:
    """The config of a user who chooses these files."""
    chosen, main = [], OmegaConf.load(CONF / "config.yaml")
    ours = {group for default in main.defaults if default != "_self_" for group in default}
    for group, name in map(group_and_name, choices):
        chosen.append(f"{group}={name}" if group in ours or group.startswith("hydra") else f"+{group}={name}")
    return composed(*chosen, *(need for choice in choices for need in NEEDS.get(choice, [])))


def targets(node: object, path: str = "") -> Iterator[tuple[str, str]]:
    """(dotted name, target) of every node that is built."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    if isinstance(node, dict) and "_target_" in node:
        yield path, node["_target_"]
    for key, child in children:
        yield from targets(child, f"{path}.{key}" if path else str(key))


def check(config: DictConfig) -> None:
    """As the command line does before a run; and every target says by its signature what it accepts."""
    settings = OmegaConf.to_container(config, resolve=True)
    validation.check(settings)
    for path, target in targets(settings):
        _, complete = parameters(get_object(target))
        assert complete or target in TAKES_ANYTHING, f"{path}: {target} has **keywords; which ones does it accept?"


def test_the_main_config_is_valid():
    check(composed())


@pytest.mark.parametrize("choices", runs(), ids=" ".join)
def test_every_choice_composes_and_fits_what_it_configures(choices):
    config = choose(*choices)
    check(config)
    for choice in choices:
        group, _ = group_and_name(choice)
        written = OmegaConf.load(CONF / f"{choice}.yaml")
        if "_target_" in written and "# @package" not in (CONF / f"{choice}.yaml").read_text():
            node = OmegaConf.select(config, group.replace("/", "."))
            assert OmegaConf.to_container(node)["_target_"] == written["_target_"], "the choice was made"
    chosen = {"model": USUAL, **dict(map(group_and_name, choices))}
    if (chosen["model"], chosen.get("method")) in SPECIALIZED:
        model, method = get_object(config.model._target_).__self__, get_object(config.method._target_)
        assert issubclass(model, method.works_on)


def test_every_specialization_is_of_a_model_and_a_method():
    assert names("specialization") == {f"{model}_{method}" for model, method in SPECIALIZED}


@pytest.mark.parametrize("experiment", sorted(names("experiment")))
def test_every_run_of_an_experiment_composes(experiment):
    comments = [
        line for line in (CONF / f"experiment/{experiment}.yaml").read_text().splitlines() if line.startswith("#")
    ]
    assert any("unlearn " in line and f"experiment={experiment}" in line for line in comments[:3]), "how is it run?"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=[*GIVEN, f"experiment={experiment}"], return_hydra_config=True)
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())  # which resolves glob(*)
    params = OmegaConf.to_container(config.hydra.sweeper, resolve=False).get("params") or {}
    swept = {}
    for key, values in params.items():
        [override] = parser.parse_overrides([f"{key}={values}"])
        if isinstance(interval := override.value(), IntervalSweep):
            swept[key] = [interval.start, interval.end]
        else:
            swept[key] = [*override.sweep_string_iterator()] if override.is_sweep_override() else [str(values)]
        if "glob(" in str(values):
            swept[key] = swept[key][:1]  # what a glob finds is composed as a choice
    for i in range(max(map(len, swept.values()), default=1)):  # each value in one run
        check(composed(f"experiment={experiment}", *(f"{key}={v[min(i, len(v) - 1)]}" for key, v in swept.items())))


def test_every_choice_begins_with_a_line_that_says_what_it_is():
    silent = [c for c in CHOICES if not (CONF / f"{c}.yaml").read_text().startswith("#")]
    assert set(silent) <= {"paths/default"}


def test_a_typo_in_a_file_would_be_noticed():
    config = composed()
    OmegaConf.set_struct(config, False)
    config.method.etaa = 1
    with pytest.raises(UserError, match="etaa"):
        check(config)
    config = composed("method=none")
    OmegaConf.set_struct(config, False)
    del config.sampler._target_, config.dataset.concept
    with pytest.raises(UserError, match="concept"):
        check(config)


def test_all_evaluators_and_loggers_at_once():
    evaluators = sorted(names("evaluator"))
    config = composed(f"evaluator=[{','.join(evaluators)}]", "logger=[csv,wandb]")
    assert set(config.evaluator) == set(evaluators) and set(config.logger) == {"csv", "wandb"}
    check(config)

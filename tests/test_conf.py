"""Every file of conf/ composes and fits the signature of the class that it configures."""

from collections.abc import Iterator

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from hydra.errors import ConfigCompositionException
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


def names(group: str) -> set[str]:
    return {p.name for p in FILES if str(p.parent) == group and not p.name.startswith("_")}


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=[*GIVEN, *overrides])


def group_and_name(choice: str) -> tuple[str, str]:
    """How a user chooses a file: method=after/relearn, hydra/launcher=slurm."""
    parts = choice.split("/")
    depth = 2 if parts[0] == "hydra" else 1
    return "/".join(parts[:depth]), "/".join(parts[depth:])


def choose(choice: str) -> DictConfig:
    """The config of a user who chooses the file `choice`."""
    group, name = group_and_name(choice)
    needs = NEEDS.get(choice, [])
    try:
        return composed(f"{group}={name}", *needs)
    except ConfigCompositionException as error:  # a group of groups that the main config does not choose from
        assert "No match in the defaults list" in str(error), str(error)
        return composed(f"+{group}={name}", *needs)


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


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes_and_fits_what_it_configures(choice):
    config = choose(choice)
    check(config)
    group, _ = group_and_name(choice)
    written = OmegaConf.load(CONF / f"{choice}.yaml")
    if "_target_" in written and "# @package" not in (CONF / f"{choice}.yaml").read_text():
        node = OmegaConf.select(config, group.replace("/", "."))
        assert OmegaConf.to_container(node)["_target_"] == written["_target_"], "the choice was made"


SPECIALIZED = {f"{model}_{method}": (model, method) for model in names("model") for method in names("method")}


@pytest.mark.parametrize("name", sorted(names("specialization")))
def test_every_specialization_is_of_a_model_and_a_method_that_works_on_it(name):
    assert name in SPECIALIZED, "no run would ever choose it"
    model, method = SPECIALIZED[name]
    config = composed(f"method={method}", f"model={model}")
    assert issubclass(get_object(config.model._target_).__self__, get_object(config.method._target_).works_on)
    check(config)


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
    for key, values in params.items():
        [override] = parser.parse_overrides([f"{key}={values}"])
        if isinstance(interval := override.value(), IntervalSweep):
            values = [interval.start, interval.end]
        else:
            swept = [*override.sweep_string_iterator()] if override.is_sweep_override() else [str(values)]
            values = swept[:1] if "glob(" in str(values) else swept  # what a glob finds is composed as a choice
        for value in values:
            check(composed(f"experiment={experiment}", f"{key}={value}"))


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

"""Every file of conf/ composes, and says nothing that what it configures would not understand."""

import inspect
from collections.abc import Callable, Iterator

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep
from hydra.errors import ConfigCompositionException
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from unlearning.__main__ import CONF
from unlearning.data import folder, prompt
from unlearning.models.flux import Flux
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.tracking import loggers

FILES = sorted(p.relative_to(CONF).with_suffix("") for p in CONF.glob("**/*.yaml") if p.parent != CONF)
# A specialization is never chosen: it comes with its method and model, and is checked with them.
CHOICES = [str(p) for p in FILES if p.parts[0] != "specialization"]
# Not known without Hydra's own process, or given by the user.
GIVEN = ["paths.output_dir=/nowhere", "title=a test"]
NEEDS = {"dataset/folder": ["forget=/a/folder"]}
# Where a function passes on the settings it has no names for. A class passes them on to its parents.
PASSES_ON: dict[Callable, Callable] = {folder.folder: prompt.task, Flux.load: StableDiffusion.load}
TAKES_ANYTHING = {loggers.wandb}  # wandb.init's settings
GIVEN_LATER = {"trainer"}  # by __main__, to the methods that need one


def names(group: str) -> set[str]:
    return {p.name for p in FILES if str(p.parent) == group and not p.name.startswith("_")}


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=[*GIVEN, *overrides])


def choose(choice: str) -> DictConfig:
    """The config of a user who chooses the file `choice`."""
    group, _, name = choice.rpartition("/")
    needs = NEEDS.get(choice, [])
    try:
        return composed(f"{group}={name}", *needs)
    except ConfigCompositionException as error:  # a group of groups that the main config does not choose from
        assert "No match in the defaults list" in str(error), str(error)
        return composed(f"+{group}={name}", *needs)


def targets(node: object, path: str = "") -> Iterator[tuple[str, dict]]:
    """Every node that is built, with where it stands."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    if isinstance(node, dict) and "_target_" in node:
        yield path, node
    for key, child in children:
        yield from targets(child, f"{path}.{key}" if path else str(key))


def accepted(target: Callable) -> dict[str, inspect.Parameter] | None:
    """The keyword parameters of a function or a class, with those of the parents that it passes others on to.

    None where it takes anything.
    """
    if target in TAKES_ANYTHING:
        return None
    known: dict[str, inspect.Parameter] = {}
    is_class = inspect.isclass(target)
    for layer in [c.__init__ for c in target.__mro__[:-1] if "__init__" in vars(c)] if is_class else [target]:
        parameters = list(inspect.signature(layer).parameters.values())[is_class:]
        known = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)} | known
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return known
    if is_class:
        return known
    assert target in PASSES_ON, f"{target} has **keywords: say in PASSES_ON what becomes of them"
    return known | accepted(PASSES_ON[target])


def check(config: DictConfig) -> None:
    for path, node in targets(OmegaConf.to_container(config, resolve=True)):
        target = get_object(node["_target_"])
        assert callable(target), f"{path}: {node['_target_']} is not callable"
        known, given = accepted(target), {k for k in node if not k.startswith("_")}
        if known is None:
            continue
        assert given <= known.keys(), f"{path}: {node['_target_']} has no {sorted(given - known.keys())}"
        missing = {k for k, v in node.items() if v == "???"}
        assert missing <= GIVEN_LATER, f"{path}: {sorted(missing)} have no value"
        if not node.get("_partial_"):
            required = {name for name, p in known.items() if p.default is p.empty}
            assert required <= given, f"{path}: {node['_target_']} needs {sorted(required - given)}"


def test_the_main_config_means_what_it_says():
    check(composed())


@pytest.mark.parametrize("choice", CHOICES)
def test_every_choice_composes_and_fits_what_it_configures(choice):
    config = choose(choice)
    check(config)
    group = choice.rpartition("/")[0]
    written = OmegaConf.load(CONF / f"{choice}.yaml")
    if "_target_" in written and "# @package" not in (CONF / f"{choice}.yaml").read_text():
        node = OmegaConf.select(config, group.replace("/", "."))
        assert OmegaConf.to_container(node)["_target_"] == written["_target_"], "the choice was made"


@pytest.mark.parametrize("method", [p.name for p in FILES if p.parent.name == "method"])
@pytest.mark.parametrize("model", [p.name for p in FILES if p.parent.name == "model"])
def test_every_method_composes_with_every_model_that_it_works_on(method, model):
    config = composed(f"method={method}", f"model={model}")  # and with what is special to the two
    kind = get_object(config.model._target_).__self__
    if issubclass(kind, get_object(config.method._target_).works_on):
        check(config)


def test_every_specialization_is_of_a_model_and_a_method():
    pairs = {f"{m}_{k}" for m in names("model") for k in names("method")}
    assert names("specialization") <= pairs, "no run would ever choose it"


@pytest.mark.parametrize("experiment", sorted(names("experiment")))
def test_every_run_of_an_experiment_composes(experiment):
    comments = [
        line for line in (CONF / f"experiment/{experiment}.yaml").read_text().splitlines() if line.startswith("#")
    ]
    assert any("unlearn " in line and f"experiment={experiment}" in line for line in comments[:3]), "how is it run?"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=[*GIVEN, f"experiment={experiment}"], return_hydra_config=True)
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())  # which knows what glob(*) stands for
    params = OmegaConf.to_container(config.hydra.sweeper, resolve=False).get("params") or {}
    for key, values in params.items():
        [override] = parser.parse_overrides([f"{key}={values}"])
        if isinstance(interval := override.value(), IntervalSweep):
            values = [interval.start, interval.end]
        else:
            values = override.sweep_string_iterator() if override.is_sweep_override() else [str(values)]
        for value in values:
            check(composed(f"experiment={experiment}", f"{key}={value}"))


def test_every_choice_says_what_it_is():
    silent = [c for c in CHOICES if not (CONF / f"{c}.yaml").read_text().startswith("#")]
    assert set(silent) <= {"paths/default"}


def test_a_typo_would_be_noticed():
    config = composed()
    OmegaConf.set_struct(config, False)
    config.method.etaa = 1
    with pytest.raises(AssertionError, match=r"ESD has no \['etaa'\]"):
        check(config)
    config = composed("method=none")
    OmegaConf.set_struct(config, False)
    del config.sampler._target_, config.dataset.concept
    with pytest.raises(AssertionError, match=r"needs \['concept'\]"):
        check(config)


def test_all_evaluators_and_loggers_at_once():
    evaluators = sorted(names("evaluator"))
    config = composed(f"evaluator=[{','.join(evaluators)}]", "logger=[csv,wandb]")
    assert set(config.evaluator) == set(evaluators) and set(config.logger) == {"csv", "wandb"}
    check(config)

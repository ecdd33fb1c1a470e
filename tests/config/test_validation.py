"""Settings that Hydra accepts, but the configured class does not, are reported before a model is loaded."""

from collections.abc import Mapping, Sequence
from enum import Enum
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, Literal, TypedDict, Unpack

import pytest
from annotated_types import Ge, Lt
from diffusers import StableDiffusionPipeline
from torch import Tensor
from yaml.loader import SafeLoader

from unlearning.config.signatures import forwards_to, parameters
from unlearning.config.validation import check, check_value
from unlearning.errors import UserError
from unlearning.methods.none import Unedited
from unlearning.models.flux import Flux
from unlearning.sampling.sampler import Sampler

HERE = __name__


@pytest.fixture
def message(error_of, tmp_path, monkeypatch):
    """message(yaml, *overrides) -> the error for an experiment that a user has written, or for overrides alone."""
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", None)  # calling it would be an error

    def call(yaml: str, *overrides: str) -> str:
        mine = tmp_path / "conf" / "experiment" / "mine.yaml"
        mine.parent.mkdir(parents=True)
        mine.write_text(f"# @package _global_\n{yaml}\n")
        runs = [f"paths.runs={tmp_path}/runs"]
        return error_of(f"hydra.searchpath=[file://{tmp_path}/conf]", "experiment=mine", *runs, *overrides).strip()

    return call


# --- texts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("yaml", "setting"),
    [
        ('dataset: {template: "a \\ud800 {}"}', "dataset.template"),
        ('concept: "\\ud800"', "concept"),
        ('dataset: {others: [dog, "\\udcff"]}', "dataset.others.1"),
        ('dataset: {anchor: {"\\udcff": sea}}', "dataset.anchor"),
    ],
)
def test_half_a_surrogate_pair_is_refused_first(message, monkeypatch, yaml, setting):
    monkeypatch.setattr("unlearning.store.finished.key", None)  # calling it would be an error
    monkeypatch.setattr("yaml.SafeLoader", SafeLoader)  # libyaml, which conftest.py takes, refuses them by itself
    said = message(f"defaults: [override /dataset: prompt, override /method: esd_x]\n{yaml}")
    assert said.startswith(f"`{setting}` holds the character '\\ud") and len(said.splitlines()) == 1
    said.encode()


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("yaml", "key", "suggestion"),
    [
        ("methd: {eta: 2}", "methd", "method"),
        ("method: {etaa: 2}", "method etaa", "eta"),
        ("method: {student: {parametres: x}}", "method.student parametres", "parameters"),
        ("paths: {stor: here}", "paths stor", "store"),
        ("evaluator: {fidd: {count: 3}}", "evaluator fidd", "fid"),
        ("evaluator: {fid: {count: 3}}", "evaluator fid", None),
        ('sampler: {guidance_scale: "${seeed}"}', "sampler.guidance_scale seeed", "seed"),
        ("defaults: [override /methd: uce]", "methd", "method"),
        ("defaults: [override /sampler: dimm]", "sampler dimm", "ddim"),
        ("sampler: {_target_: unlearning.sampling.Samplr}", "sampler._target_ unlearning.sampling.Samplr", None),
        (
            "sampler: {scheduler: {path: diffusers.DDIMSchedular}}",
            "sampler.scheduler.path diffusers.DDIMSchedular",
            None,
        ),
    ],
)
def test_a_typo_in_a_file_gets_a_suggestion(message, yaml, key, suggestion):
    answer = message(yaml, "method=esd_x")
    assert all(word in answer for word in key.split())
    assert suggestion is None or f"Did you mean {suggestion}?" in answer


def test_a_file_that_is_no_yaml_is_an_error(message):
    assert "YAML" in message("sampler: {steps: 2", "method=esd_x")


@pytest.mark.parametrize(
    ("choice", "setting", "suggestion"),
    [
        ("dataset=folder", "dataset.synonims=[kitten]", "synonyms"),
        ("model=flux", "model.attention_slicng=true", "attention_slicing"),
        ("logger=wandb", "logger.wandb.projct=mine", "project"),
    ],
)
def test_a_typo_in_a_forwarded_argument_gets_a_suggestion(error_of, monkeypatch, choice, setting, suggestion):
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", None)
    answer = error_of(choice, f"+{setting}")
    assert setting.partition("=")[0].rpartition(".")[2] in answer and f"Did you mean {suggestion}?" in answer


def test_arguments_that_only_another_library_knows_are_accepted(unlearn):
    unlearn("logger=wandb", "+logger.wandb.entity=me", "stages=[]")


def test_a_typo_in_the_sweep_of_a_file_gets_a_suggestion(message):
    answer = message("hydra: {sweeper: {params: {concpt: 'cat,dog'}}}", "-m")
    assert "concpt" in answer and "Did you mean concept?" in answer


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["hydra/launcher=jobli"], ["jobli", "Did you mean joblib?"]),
        (["hydra/launcher=basic", "hydra.launcher.n_jobs=2"], ["hydra.launcher", "n_jobs"]),
        (["hydra/sweeper=study"], ["objective"]),
    ],
)
def test_a_mistake_in_a_launcher_or_sweeper_gets_a_suggestion(message, overrides, words):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    answer = message("seed: 0", "-m", *overrides)
    assert all(word in answer for word in words)


def test_a_name_that_another_setting_refers_to_is_the_users_own(unlearn, tmp_path):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nfew: 3\nsampler: {guidance_scale: '${few}'}\n"
    )
    unlearn(f"hydra.searchpath=[file://{tmp_path}/conf]", "experiment=mine", "stages=[]")


# --- values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("sampler.schedule=ppaer", "'ppaer'"),
        ("method.optimizer.lr=abc", "'abc'"),
        ("dataset.template=[kitten]", "['kitten']"),
    ],
)
def test_a_value_of_another_type_is_an_error_before_anything_is_fitted(message, override, value):
    answer = message("dataset: {template: 'a {}'}", "method=esd_x", "dataset=prompt", override)
    assert answer.startswith(f"`{override.partition('=')[0]}` ") and value in answer


def test_the_error_lists_the_possible_values(message):
    answer = message("seed: 0", "model.dtype=flaot16")
    assert answer.startswith("`model.dtype` ") and "'flaot16'" in answer
    assert all(dtype in answer for dtype in ("float32", "bfloat16", "float16"))
    with pytest.raises(UserError, match="ppaer"):
        Sampler(schedule="ppaer")


class Colour(Enum):
    RED = "red"


@pytest.mark.parametrize(
    ("hint", "good", "bad"),
    [
        (int, [3, -1], [2.5, "3", True, None]),
        (float, [3, 2.5], ["3", True]),
        (float | Tensor, [3, 2.5], ["abc", [1.0]]),
        (bool, [True], [1, "yes"]),
        (str, ["a", 1984, 0.5], [["a"], True]),
        (str | None, ["a", None], [["a"]]),
        (str | Sequence[str], ["a", 7, ["a", 7]], [[["a"]]]),
        (Path, ["a/b"], [3]),
        (Colour, ["red"], ["blue"]),
        (tuple[str, ...], [["a"], []], ["a", 3]),
        (Sequence[int], [[1, 2]], [[1, "b"], 3]),
        (Sequence[str], [["a"]], ["a"]),
        (Mapping[str, int], [{"a": 1}], [{"a": "b"}]),
        (Literal["exact", 2], ["exact", 2], ["reuse", 3]),
        (Annotated[int, Ge(1)], [1], [0, "1"]),
        (Annotated[float, Ge(0), Lt(1)] | None, [0, 0.5, None], [1, -0.1]),
        (Sequence[Tensor], [[{"_target_": "torch.zeros"}]], [["a"]]),
        (Any, ["a", 3, [1]], []),
        ("whatever", ["a", 3, [1]], []),
    ],
)
def test_values_and_types(hint, good, bad):
    for value in good:
        check_value("x", value, hint)
    for value in bad:
        with pytest.raises(UserError, match="`x"):
            check_value("x", value, hint)


def test_an_entry_of_a_list_is_named():
    with pytest.raises(UserError, match=r"`dataset\.seeds\.1`.*'b'"):
        check_value("dataset.seeds", [1, "b"], Sequence[int])


# --- signatures -------------------------------------------------------------------------------------------------------


class Ranged:
    """A class with ranges for its settings."""

    def __init__(self, *, iterations: Annotated[int, Ge(1)] = 10, share: Annotated[float, Ge(0), Lt(1)] = 0.5):
        self.iterations, self.share = iterations, share


class Deeper(Ranged):
    """A class that passes settings on to its parent."""

    def __init__(self, *, depth: int, **settings):
        super().__init__(**settings)
        self.depth = depth


def half(numerator: int) -> float:
    return numerator / 2


@forwards_to(half)
def quarter(times: int = 1, **settings) -> float:
    return half(**settings) / 2 * times


@wraps(half)
def logged(*args, **settings) -> float:
    return half(*args, **settings)


class Sizes(TypedDict, total=False):
    width: Annotated[int, Ge(8)]


def resized(height: int, **sizes: Unpack[Sizes]) -> tuple[int, int]:
    return height, sizes.get("width", height)


def anything(**settings) -> dict:
    return dict(sorted(settings.items()))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"_target_": "half"}, ["thing", "numerator"]),
        ({"_target_": "half", "numerator": "???"}, ["thing.numerator=..."]),
        ({"_target_": "half", "numerator": "x"}, ["thing.numerator"]),
        ({"_target_": "quarter", "nmerator": 1}, ["nmerator", "Did you mean numerator?"]),
        ({"_target_": "quarter", "numerator": "x"}, ["thing.numerator"]),
        ({"_target_": "logged", "numerator": "x"}, ["thing.numerator"]),
        ({"_target_": "resized", "height": 8, "widht": 8}, ["widht", "Did you mean width?"]),
        ({"_target_": "resized", "height": 8, "width": 2}, ["thing.width", "8"]),
        ({"_target_": "Ranged", "iterations": 0}, ["thing.iterations", "1"]),
        ({"_target_": "Deeper", "depth": 2, "share": 1.0}, ["thing.share"]),
        ({"_target_": "Deeper", "depth": 2, "sahre": 0.5}, ["sahre", "Did you mean share?"]),
        ({"_target_": "Deeper"}, ["depth"]),
    ],
)
def test_settings_that_do_not_fit_a_signature(settings, words):
    with pytest.raises(UserError) as error:
        check({"thing": settings | {"_target_": f"{HERE}.{settings['_target_']}"}})
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize(
    "settings",
    [
        {"_target_": "half", "_partial_": True},
        {"_target_": "quarter", "numerator": 1},
        {"_target_": "resized", "height": 8, "width": 8},
        {"_target_": "anything", "numerator": "x"},
        {"_target_": "Ranged", "iterations": 1, "share": 0},
        {"_target_": "Deeper", "depth": 2, "iterations": {"_target_": f"{HERE}.half", "numerator": 4}},
    ],
)
def test_settings_that_fit_a_signature(settings):
    check({"thing": settings | {"_target_": f"{HERE}.{settings['_target_']}"}})


def test_what_a_signature_takes():
    accepted, complete = parameters(Flux.load)
    assert complete and {"path", "embedded_guidance", "attention_slicing"} <= accepted.keys()
    accepted, complete = parameters(quarter)
    assert complete and accepted.keys() == {"numerator", "times"} and accepted["numerator"].annotation is int
    assert parameters(anything) == ({}, False) and parameters(Unedited) == ({}, True)

"""What Hydra lets pass, and what it configures would not understand, is told before a model is loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
from diffusers import StableDiffusionPipeline
from torch import Tensor

from unlearning.config.validation import accepts, check, parameters
from unlearning.errors import UserError
from unlearning.methods.none import Unedited
from unlearning.models.flux import Flux
from unlearning.sampling.sampler import Sampler


@pytest.fixture
def told_of(told, tmp_path, monkeypatch):
    """told_of(yaml, *overrides) -> what is told of an experiment that a user has written, or of overrides alone."""
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", None)  # to call it would be an error

    def call(yaml: str, *overrides: str) -> str:
        mine = tmp_path / "conf" / "experiment" / "mine.yaml"
        mine.parent.mkdir(parents=True)
        mine.write_text(f"# @package _global_\n{yaml}\n")
        return told(f"hydra.searchpath=[file://{tmp_path}/conf]", "experiment=mine", *overrides).strip()

    return call


@pytest.mark.parametrize(
    ("yaml", "answer"),
    [
        ("methd: {eta: 2}", "There is no setting `methd`. Did you mean `method`?"),
        ("method: {etaa: 2}", "method has no setting `etaa`. Did you mean `eta`?"),
        ("method: {student: {parametres: x}}", "method.student has no setting `parametres`. Did you mean `para"),
        ("dataset: {templat: the}", "dataset has no setting `templat`. Did you mean `template`?"),
        ("sampler: {stepps: 2}", "sampler has no setting `stepps`. Did you mean `steps`?"),
        ("paths: {stor: here}", "paths has no setting `stor`. Did you mean `store`?"),
        ("judge: {clp: here}", "judge has no setting `clp`. Did you mean `clip`?"),
        ("evaluator: {fidd: {count: 3}}", "evaluator has no setting `fidd`. Did you mean `fid`?"),
        ("evaluator: {fid: {count: 3}}", "The evaluator `fid` is not part of this run. Choose it too:"),
        ("trainer: {max_epoch: 3}", "trainer has no setting `max_epoch`. Did you mean `max_epochs`?"),
        ('sampler: {guidance_scale: "${seeed}"}', "`sampler.guidance_scale` refers to `seeed`, which is no setting."),
        ("defaults: [override /methd: uce]", "There is no group `methd` to choose from. Did you mean `method`?"),
        ("defaults: [override /sampler: dimm]", "There is no sampler `dimm`. Did you mean `ddim`?"),
        ("sampler: {steps: 2", "A file of settings is not written as YAML is:"),
        ("sampler: {_target_: unlearning.sampling.Samplr}", "`sampler._target_` is unlearning.sampling.Samplr, which"),
    ],
)  # fmt: skip
def test_a_typo_in_a_file_is_answered(told_of, yaml, answer):
    assert told_of(yaml, "method=esd_x").startswith(answer)


@pytest.mark.parametrize(
    ("choice", "setting", "answer"),
    [
        ("dataset=folder", "dataset.synonims=[kitten]", "dataset has no setting `synonims`. Did you mean `synonyms`?"),
        ("dataset=folder", "dataset.template=[kitten]", "`dataset.template` has to be a text, and is ['kitten']."),
        ("model=flux", "model.attention_slicng=true", "model has no setting `attention_slicng`. Did you mean `attent"),
        ("logger=wandb", "logger.wandb.projct=mine", "logger.wandb has no setting `projct`. Did you mean `project`?"),
    ],
)
def test_a_typo_in_what_a_function_passes_on_is_answered(told, monkeypatch, choice, setting, answer):
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", None)
    assert told(choice, f"+{setting}").strip().startswith(answer)


def test_what_only_another_library_understands_is_accepted(unlearn):
    unlearn("logger=wandb", "+logger.wandb.entity=me", "stages=[]")


def test_an_unknown_schedule_is_answered_before_anything_is_fitted(told, monkeypatch):
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", None)
    said = told("sampler.schedule=ppaer")
    assert said.strip() == "`sampler.schedule` has to be 'diffusers' or 'paper', and is 'ppaer'."
    with pytest.raises(UserError, match="There is no schedule 'ppaer'; there are diffusers, paper"):
        Sampler(schedule="ppaer")


def test_a_typo_in_what_a_file_sweeps_over_is_answered(told_of):
    said = told_of("hydra: {sweeper: {params: {concpt: 'cat,dog'}}}", "-m")
    assert said == "There is no setting `concpt`. Did you mean `concept`?"


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        ("sampler.steps=many", "`sampler.steps` has to be a whole number, and is 'many'."),
        ("sampler.steps=2.5", "`sampler.steps` has to be a whole number, and is 2.5."),
        ("method.optimizer.lr=abc", "`method.optimizer.lr` has to be a number, and is 'abc'."),
        ("model.compile=maybe", "`model.compile` has to be true or false, and is 'maybe'."),
        ("model.dtype=flaot16", "`model.dtype` has to be 'float32' or 'bfloat16' or 'float16', and is 'flaot16'."),
        ("method.batch_size=[1]", "`method.batch_size` has to be a whole number, and is [1]."),
    ],
)
def test_a_value_of_another_kind_is_answered(told_of, override, answer):
    assert told_of("seed: 0", "method=esd_x", override) == answer


@pytest.mark.parametrize(
    ("overrides", "answer"),
    [
        (["hydra/launcher=jobli"], "There is no hydra/launcher `jobli`. Did you mean `joblib`?"),
        (["hydra/launcher=basic", "hydra.launcher.n_jobs=2"], "hydra.launcher has no setting `n_jobs`."),
        (["hydra/sweeper=study"], "A study needs to know what to learn from"),
    ],
)
def test_a_mistake_about_a_launcher_or_a_sweeper_is_answered(told_of, overrides, answer):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    assert told_of("seed: 0", "-m", *overrides).startswith(answer)


def test_a_name_that_another_setting_refers_to_is_the_users_own(unlearn, tmp_path):
    (tmp_path / "conf" / "experiment").mkdir(parents=True)
    (tmp_path / "conf" / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nfew: 3\nsampler: {guidance_scale: '${few}'}\n"
    )
    unlearn(f"hydra.searchpath=[file://{tmp_path}/conf]", "experiment=mine", "stages=[]")


@pytest.mark.parametrize(
    ("hint", "yes", "no"),
    [
        (int, [3, -1], [2.5, "3", True]),
        (float | Tensor, [3, 2.5], ["abc", [1.0]]),
        (bool, [True], [1, "yes"]),
        (str, ["a", 1984], [["a"]]),
        (str | None, ["a"], [["a"]]),
        (Path, ["a/b"], [3]),
        (tuple[str, ...], [["a"], []], ["a", 3]),
        (Sequence[int], [[1, 2]], [[1, "b"], 3]),
        (Literal["exact", 2], ["exact", 2], ["reuse", 3]),
        (Any, ["a", 3, [1]], []),
        ("whatever", ["a", 3, [1]], []),
    ],
)
def test_what_cannot_be_told_is_accepted(hint, yes, no):
    assert all(accepts(hint, value) for value in yes)
    assert not any(accepts(hint, value) for value in no)


def test_what_is_needed_is_asked_for():
    with pytest.raises(UserError, match="thing needs the setting `numerator`"):
        check({"thing": {"_target_": "tests.test_checking.half"}})
    with pytest.raises(UserError, match=r"`thing.numerator` has no value. Give it one: `thing.numerator=...`"):
        check({"thing": {"_target_": "tests.test_checking.half", "numerator": "???"}})
    check({"thing": {"_target_": "tests.test_checking.half", "_partial_": True}})


def test_what_a_function_passes_on_is_what_the_other_knows():
    known, complete = parameters(Flux.load)
    assert complete and {"path", "embedded_guidance", "attention_slicing"} <= known.keys()
    known, complete = parameters(quarter)
    assert complete and known.keys() == {"numerator", "times"} and known["numerator"].annotation is int
    check({"thing": {"_target_": "tests.test_checking.quarter"}})  # who gives what is needed
    assert parameters(anything) == ({}, False) and parameters(Unedited) == ({}, True)


def half(numerator: int) -> float:
    return numerator / 2


def quarter(times: int = 1, **settings) -> float:
    settings = {"numerator": 1, **settings}
    return half(**settings) / 2 * times


def anything(**settings) -> dict:
    return dict(sorted(settings.items()))

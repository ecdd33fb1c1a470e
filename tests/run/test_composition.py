"""Several stages, several requests, several concepts: runs on top of earlier erasures."""

from functools import partialmethod

import pytest
import torch
from torch import nn

from tests.run.small import FIT, SMALL, TRAIN, image_evaluations, image_files
from unlearning.erasures.base import Erasure
from unlearning.store.manifest import load_images, read_manifest

UCE = [*SMALL, "method=uce"]


def test_a_method_of_two_stages_trains_both(unlearn, evaluations):
    stages = [o.replace("method.", "method.stages.esd_x.") for o in TRAIN[1:]]
    both = unlearn(*SMALL, "method=uce_esd_x", *stages, "method.stages.esd_x.iterations=3", "stages=[fit]", run="both")
    assert evaluations() == 3 * FIT
    uce = unlearn(*UCE, "stages=[fit]", run="uce")
    esd = unlearn(*SMALL, *TRAIN, "method.iterations=3", f"after={uce}/erasure", "stages=[fit]", run="esd")
    assert evaluations() == 3 * FIT
    one, two = (Erasure.load(run / "erasure") for run in (both, esd))
    assert one.digest == two.digest, "a stage is a request on top of the one before"


def test_an_interrupted_second_stage_resumes_from_its_own_checkpoint(unlearn, monkeypatch, evaluations):
    from unlearning.methods.esd import ESD

    stages = [o.replace("method.", "method.stages.esd_x.") for o in TRAIN[1:]]
    command = [*SMALL, "method=uce_esd_x", *stages, "method.stages.esd_x.iterations=4", "stages=[fit]"]
    whole = unlearn(*command, run="apart/whole")
    evaluations()
    loss, calls = ESD.loss, []

    def interrupted(self, prompts):
        calls.append(self.global_step)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return loss(self, prompts)

    monkeypatch.setattr(ESD, "loss", interrupted)
    with pytest.raises(SystemExit):
        unlearn(*command, run="again")
    again = unlearn(*command, run="again")
    assert calls == [0, 1, 2, 3, 2, 3], "the checkpoint of the second step is the last"
    assert Erasure.load(again / "erasure").digest == Erasure.load(whole / "erasure").digest


def test_sequential_erasure_requests_compose(unlearn, tmp_path, evaluations):
    """Three runs, each on top of the one before; the base model stays the unedited one."""
    first = unlearn(*UCE, "stages=[fit,generate]", run="first")
    evaluations()
    second = unlearn("dataset=prompt", "dataset.others=[cat,sky]", "method=negative_prompt", "concept=dog",
                     f"after={first}/erasure", "stages=[fit,generate]", run="second")  # fmt: skip
    assert evaluations() == image_evaluations(3), "the base model's images are there already"
    third = unlearn(*SMALL, *TRAIN, "method.iterations=2", f"after={second}/erasure", "stages=[fit]", run="third")
    kinds = [type(part).__name__ for part in Erasure.load(third / "erasure").parts]
    assert kinds == ["WeightPatch", "GuidanceEdit", "WeightPatch"]
    base, erased = (load_images(read_manifest(second / "images" / f"{name}.csv")) for name in ("base", "erased"))
    assert (base != erased).any()
    assert image_files(tmp_path / "store")


def test_an_erasure_of_another_model_is_refused(error_of, unlearn, model):
    first = unlearn(*UCE, "stages=[fit]", run="first")
    config = model / "model_index.json"
    config.write_text(config.read_text() + "\n")
    assert "first" in error_of(*UCE, f"model.path={model}", f"after={first}/erasure", run="second")


def test_several_concepts_are_erased_at_once(unlearn):
    run = unlearn("dataset=prompt", "concept=[cat,dog]", "dataset.others=[sky]", "method=uce", "stages=[fit,generate]")
    rows = read_manifest(run / "images" / "erased.csv")
    assert {(row.concept, row.role) for row in rows} == {("cat", "erase"), ("dog", "erase"), ("", "retain")}
    names = Erasure.load(run / "erasure").weights
    one = unlearn("dataset=prompt", "concept=cat", "method=uce", "stages=[fit]", run="one")
    alone = Erasure.load(one / "erasure").weights
    assert names.keys() == alone.keys() and any(not torch.equal(v, alone[n]) for n, v in names.items())


def test_a_compiled_model_is_erased_and_drawn_like_any_other(unlearn, monkeypatch):
    """With an adapter and its guidance: hooks are added and removed after the denoiser was compiled."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend="eager"))
    train = [
        *SMALL,
        "method=unguide",
        *TRAIN[1:],
        "method.iterations=2",
        "method.repeats=2",
        "method.schedule=diffusers",
        "stages=[fit,generate]",
    ]
    plain = unlearn(*train, run="plain")
    compiled = unlearn(*train, "model.compile=true", run="compiled")
    for name in ("base", "erased"):
        one, two = (load_images(read_manifest(run / "images" / f"{name}.csv")).astype(int) for run in (plain, compiled))
        assert abs(one - two).max() <= 1

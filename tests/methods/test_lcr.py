"""Latent code replacement from the command line: what is written, what is left alone, what is said."""

import csv
import json
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from skimage import data as photographs

from unlearning.codes.erasure import CodebookEdit
from unlearning.codes.frequency import count
from unlearning.codes.replacement import Counted, Uniform
from unlearning.concepts import Concept, UnlearningTask
from unlearning.detectors.base import Detector, NudeNet, cells
from unlearning.erasures.base import Erasure
from unlearning.models.vqgan import VQGAN
from unlearning.sampling.reconstruction import Reconstruction, as_tensor
from unlearning.store.images import load, read_manifest

SMALL = ["model=emoji_vqgan", "method.selection.top=4", "method.selection.min_freq=1", "stages=[fit,generate,evaluate]"]
EXACT = ["method=lcr_localized", "detector@method.detector=boxes"]
BRIGHT = 104  # the mean of the astronaut is 115, of the coffee 93


def drawn(run):
    return (read_manifest(run / "images" / f"{name}.csv") for name in ("base", "erased"))


def alike(a, b):
    """To one level of 255: a batch of another size may round otherwise."""
    return np.abs(a.astype(int) - b).max() <= 1


def test_localized_changes_the_concepts_cells_and_no_others(unlearn, vqgan):
    run = unlearn(*SMALL, *EXACT, "evaluator=[accuracy,similarity,replaced]")
    base, erased = drawn(run)
    model, erasure = VQGAN.load(str(vqgan), device="cpu"), Erasure.load(run / "erasure")
    assert [row.base for row in erased] == [row.path for row in base]
    for row in erased:
        where = cells([[r.box for r in row.regions if r.role == "erase"]], (64, 64), (16, 16))
        codes = model.encode(as_tensor(load([row], "source")))
        with erasure.applied_to(model):
            _, (told,) = Reconstruction().draw(model, [row])
        assert json.loads(json.dumps(told)) == row.decided
        assert told["chosen"] == where.sum() and told["changed"] <= told["chosen"] and told["cells"] == 256
        if row.role == "retain":
            assert told["boxes"] == [] and np.array_equal(load([row]), load([row], "base"))
        else:
            assert told["changed"] > 0.5 * told["chosen"] and codes.shape == (1, 16, 16)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["retention/cells_changed"] == 0 and metrics["efficacy/unchanged"] == 0
    assert 0 < metrics["fidelity/cells_changed"] < 60
    assert metrics["fidelity/psnr"] < 60 and "base/fidelity/psnr" not in metrics
    assert {"efficacy/acc_e", "retention/acc_s", "base/efficacy/acc_e"} <= metrics.keys()


def test_global_replaces_every_code_of_e_everywhere(unlearn, vqgan):
    run = unlearn(*SMALL, "method=lcr", "replacement@method.replacement=constant", "evaluator=[]")
    model, erasure = VQGAN.load(str(vqgan), device="cpu"), Erasure.load(run / "erasure")
    E = erasure.known.explicit
    assert len(E) == 4 and not torch.isin(E, erasure.known.safe).any()
    _, erased = drawn(run)
    for row in erased:
        codes = model.encode(as_tensor(load([row], "source")))
        expected = model.decode(codes.masked_fill(torch.isin(codes, E), 0))
        expected = (expected * 255).round().byte().permute(0, 2, 3, 1).numpy()
        assert alike(load([row]), expected)
        assert row.decided["chosen"] == torch.isin(codes, E).sum()


def test_batches_change_no_picture(unlearn, tmp_path):
    runs = [
        unlearn(
            *SMALL, *EXACT, f"sampler.batch_size={n}", f"paths.store={tmp_path}/store{n}", "evaluator=[]", run=f"{n}"
        )
        for n in (1, 8)
    ]
    (_, one), (_, other) = map(drawn, runs)
    one, other = list(one), list(other)
    assert alike(load(one), load(other)) and [r.decided for r in one] == [r.decided for r in other]


@pytest.fixture
def photos(tmp_path):
    """A folder of forget, of retain, and of input photographs, of which one shows a face."""
    pictures = {"astronaut": photographs.astronaut(), "coffee": photographs.coffee()}
    for folder, names in {"forget": ["astronaut"], "retain": ["coffee"], "input": list(pictures)}.items():
        (tmp_path / folder).mkdir()
        for name in names:
            for i in range(1 if folder == "input" else 2):  # one in five is kept apart to measure against
                Image.fromarray(pictures[name]).save(tmp_path / folder / f"{name}{i}.png")
    told = {folder: f"{folder}={tmp_path / folder}" for folder in ("forget", "retain", "input")}
    return ["dataset=folder", "dataset.size=64", "concept=face", *told.values()]


NUDENET = [
    "method=lcr_nudity",
    "method.detector.classes=[FACE_FEMALE]",
    "method.detector.min_score=0.3",
    "evaluator=[replaced]",
]


def test_a_folder_of_photographs_is_cleaned_and_its_manifest_says_where(unlearn, photos, monkeypatch):
    monkeypatch.setattr(NudeNet, "_boxes", lambda self, image: [(24, 8, 36, 22)] if image.mean() > BRIGHT else [])
    run = unlearn(*SMALL, *NUDENET, *photos)
    with (run / "images" / "erased.csv").open(newline="") as file:
        told = {row["prompt"]: json.loads(row["decided"]) for row in csv.DictReader(file)}
    assert told["astronaut0.png"]["boxes"] == [[24, 8, 36, 22]] and told["astronaut0.png"]["chosen"] == 3 * 4
    assert told["coffee0.png"] == {"boxes": [], "cells": 256, "chosen": 0, "changed": 0}
    erased = sorted(list(drawn(run))[1], key=lambda row: row.prompt)
    same = {row.prompt: np.array_equal(load([row]), load([row], "base")) for row in erased}
    assert same == {"astronaut0.png": False, "coffee0.png": True}, "nothing found: it passes through unchanged"
    assert json.loads((run / "metrics.json").read_text())["efficacy/unchanged"] == 50, "and is counted"
    assert {p.name for p in (run / "images" / "erased").iterdir()} == set(same), "under their own names"
    assert (run / "images" / "erased" / "astronaut0.png").read_bytes() == erased[0].path.read_bytes()


def test_a_detector_that_trips_over_a_picture_is_a_failure_of_that_picture(unlearn, told, photos, monkeypatch):
    def trips(self, image):
        if image.mean() > BRIGHT:
            raise RuntimeError("bad picture")
        return []

    monkeypatch.setattr(NudeNet, "_boxes", trips)
    with pytest.raises(SystemExit) as stop:
        unlearn(*SMALL, *NUDENET, *photos)
    assert "images that could not be made: 1" in str(stop.value.code)


def test_a_failed_picture_is_in_no_manifest(unlearn, photos, tmp_path, monkeypatch):
    monkeypatch.setattr(NudeNet, "_boxes", lambda self, image: 1 / 0 if image.mean() > BRIGHT else [])
    with pytest.raises(SystemExit):
        unlearn(*SMALL, *NUDENET, *photos)
    _, erased = drawn(tmp_path / "run")
    assert [row.prompt for row in erased] == ["coffee0.png"]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["cost/failed"] == 1
    monkeypatch.setattr(NudeNet, "_boxes", lambda self, image: [])
    _, erased = drawn(unlearn(*SMALL, *NUDENET, *photos))
    assert len(list(erased)) == 2, "the same command goes on from there"


def test_codes_can_be_counted_within_boxes_alone(unlearn):
    """Fewer places of forget pictures count, and the concept's own codes come first."""
    runs = [unlearn(*SMALL, *EXACT, "evaluator=[]", "stages=[fit]", *more, run=str(i)) for i, more in enumerate(
        ([], ["+detector@method.within=boxes"]))]  # fmt: skip
    whole, within = (set(Erasure.load(run / "erasure").known.explicit.tolist()) for run in runs)
    assert whole != within


def test_a_forget_picture_that_the_detector_trips_over_is_not_counted(vqgan, caplog):
    @dataclass(frozen=True)
    class Trips(Detector):
        def __call__(self, images, known):
            return [[(0, 0, 64, 64)] if image.any() else 1 / 0 for image in images]

    light, dark = np.full((64, 64, 3), 200, np.uint8), np.zeros((64, 64, 3), np.uint8)
    task = UnlearningTask((Concept("light"),), forget_images=[light, dark, light], retain_images=[dark])
    model, quiet = VQGAN.load(str(vqgan), device="cpu"), {"logger": False, "enable_progress_bar": False}
    found = count(model, task, partial(pl.Trainer, **quiet, accelerator="cpu"), within=Trips())
    assert found.images == [2, 1] and found.codes.sum(1).tolist() == [2 * 256, 256]
    assert "a forget picture is not counted: the detector failed" in caplog.text


@pytest.mark.parametrize("overrides, said", [
    (["method.selection.min_freq=1000000", "method=lcr"], "No code is safe"),
    (["method.selection.top=null", "method.selection.threshold=1e12", "method=lcr"], "No code scores"),
    (["method=lcr", "dataset=emoji_objects"], "needs pictures to start from"),
    (["method=lcr", "dataset.concept=catt"], "Did you mean cat"),
    (["method=lcr", "method.selection.score=odds"], "ratio, log_odds"),
    (["method=lcr_localized", "method.detector.concept=catt"], "Did you mean cat"),
])  # fmt: skip
def test_bad_input_is_said_before_any_picture_is_written(told, tmp_path, overrides, said):
    unnamed = [o for o in SMALL if o.partition("=")[0] not in {p.partition("=")[0] for p in overrides}]
    assert said in told(*unnamed, "evaluator=[]", *overrides)
    assert not list((tmp_path / "store").rglob("*.png")) or "detector" in overrides[-1]


def test_methods_and_datasets_of_the_other_kind_of_model_are_refused(told):
    assert "works on a DiffusionModel; a VQGAN is none" in told("model=emoji_vqgan", "method=esd_x")
    assert "works on a VQGAN; a StableDiffusion is none" in told("method=lcr")
    assert "dataset has pictures and no prompts" in told("dataset=emoji_scenes")


def test_every_detector_can_be_saved_with_its_settings():
    from dataclasses import asdict

    for kind in Detector.__subclasses__():
        settings = {"concept": "cat", "path": "x"} if kind.__name__ == "Judge" else {}
        assert kind(**json.loads(json.dumps(asdict(kind(**settings))))) == kind(**settings)


def test_the_face_in_a_real_photograph_is_replaced_to_the_cell(vqgan):
    """NudeNet finds it, in 256 × 256 pixels; every cell under its box gets another code, and no other cell does."""
    photo = np.asarray(Image.fromarray(photographs.astronaut()).resize((256, 256)))
    model, detector = VQGAN.load(str(vqgan), device="cpu"), NudeNet(classes=("FACE_FEMALE",), min_score=0.5)
    codes = model.encode(as_tensor(photo[None]))
    unseen = next(k for k in range(32) if not (codes == k).any())
    known = Counted(torch.tensor([0]), torch.tensor([unseen]), torch.ones(32))
    with CodebookEdit(known, Uniform(), detector).applied_to(model):
        after, (told,) = model.edit(photo[None], codes, [None], [0])
    (box,) = told["boxes"]
    left, top, right, bottom = (side / 4 for side in box)  # a cell is four pixels wide
    rows, columns = np.mgrid[:64, :64]
    under = (columns + 1 > left) & (columns < right) & (rows + 1 > top) & (rows < bottom)
    assert np.array_equal((after != codes)[0].numpy(), under) and 0 < under.mean() < 0.2

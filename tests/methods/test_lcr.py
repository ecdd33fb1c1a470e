"""Latent code replacement from the command line: changed and unchanged codes, and errors."""

import csv
import json
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate
from PIL import Image
from skimage import data as photographs

from tests.composed import config
from unlearning.codes.erasure import CodebookEdit
from unlearning.codes.frequency import count_codes
from unlearning.codes.replacement import CodeStatistics, Uniform
from unlearning.concepts import Concept, UnlearningTask
from unlearning.detectors.base import Detector
from unlearning.detectors.geometry import cells
from unlearning.detectors.nudenet import NudeNet
from unlearning.erasures.base import Erasure
from unlearning.models.vqgan import VQGAN
from unlearning.sampling.reconstruction import Reconstruction, as_tensor
from unlearning.store.manifest import load_images, read_manifest

TOP = ["method.selection.top=4", "method.selection.min_freq=1"]
SMALL = ["model=emoji_vqgan", *TOP, "stages=[fit,generate,evaluate]"]
EXACT = ["method=lcr_localized", "detector@method.detector=boxes"]
BRIGHT = 104  # the mean of the astronaut is 115, that of the coffee 93


def manifests(run):
    return (read_manifest(run / "images" / f"{name}.csv") for name in ("base", "erased"))


def pixels(images):
    return (images * 255).round().byte().permute(0, 2, 3, 1).numpy()


def alike(a, b):
    """Equal up to one level of 255, which another batch size may change by rounding."""
    return np.abs(a.astype(int) - b).max() <= 1


def test_localized_changes_only_cells_of_the_concept(unlearn, vqgan):
    run = unlearn(*SMALL, *EXACT, "evaluator=[accuracy,similarity,replaced]")
    base, erased = manifests(run)
    model, erasure = VQGAN.load(str(vqgan), device="cpu"), Erasure.load(run / "erasure")
    assert [row.base for row in erased] == [row.path for row in base]
    for row in erased:
        mask = cells([[r.box for r in row.regions if r.role == "erase"]], (64, 64), (16, 16))
        codes = model.encode(as_tensor(load_images([row], "source")))
        with erasure.applied_to(model):
            alone, (record,) = Reconstruction().draw(model, [row])
        assert json.loads(json.dumps(record)) == row.decided
        assert alike(load_images([row]), pixels(alone)), "whatever the batch"
        assert record["chosen"] == mask.sum() and record["changed"] <= record["chosen"] and record["cells"] == 256
        if row.role == "retain":
            assert record["boxes"] == [] and np.array_equal(load_images([row]), load_images([row], "base"))
        else:
            assert record["changed"] > 0.5 * record["chosen"] and codes.shape == (1, 16, 16)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["retention/cells_changed"] == 0 and metrics["efficacy/unchanged"] == 0
    assert 0 < metrics["fidelity/cells_changed"] < 60
    assert metrics["fidelity/psnr"] < 60 and "base/fidelity/psnr" not in metrics
    assert {"efficacy/acc_e", "retention/acc_s", "base/efficacy/acc_e"} <= metrics.keys()


def test_global_replaces_every_code_of_e_everywhere(unlearn, vqgan):
    run = unlearn(*SMALL, "method=lcr", "replacement@method.replacement=constant", "evaluator=[]")
    model, erasure = VQGAN.load(str(vqgan), device="cpu"), Erasure.load(run / "erasure")
    E = erasure.statistics.explicit
    assert len(E) == 4 and not torch.isin(E, erasure.statistics.safe).any()
    _, erased = manifests(run)
    for row in erased:
        codes = model.encode(as_tensor(load_images([row], "source")))
        expected = model.decode(codes.masked_fill(torch.isin(codes, E), 0))
        assert alike(load_images([row]), pixels(expected))
        assert row.decided["chosen"] == torch.isin(codes, E).sum()


@pytest.fixture
def photos(tmp_path):
    """Overrides for folders of forget, retain and input photographs; one photograph shows a face."""
    pictures = {"astronaut": photographs.astronaut(), "coffee": photographs.coffee()}
    for folder, names in {"forget": ["astronaut"], "retain": ["coffee"], "input": list(pictures)}.items():
        (tmp_path / folder).mkdir()
        for name in names:
            for i in range(1 if folder == "input" else 2):  # one in five is kept apart to measure against
                Image.fromarray(pictures[name]).save(tmp_path / folder / f"{name}{i}.png")
    folders = [f"{folder}={tmp_path / folder}" for folder in ("forget", "retain", "input")]
    return ["dataset=folder", "dataset.size=64", "concept=face", *folders]


NUDENET = [
    "method=lcr_nudity",
    "method.detector.classes=[FACE_FEMALE]",
    "method.detector.min_score=0.3",
    "evaluator=[replaced]",
]


def test_a_folder_of_photographs_is_edited_and_an_image_that_crashed_is_made_by_the_next_run(
    unlearn, error_of, photos, tmp_path, monkeypatch
):
    monkeypatch.setattr(NudeNet, "_boxes", lambda self, image: 1 / 0 if image.mean() > BRIGHT else [])
    assert "could not be generated: 1" in error_of(*SMALL, *NUDENET, *photos)
    _, erased = manifests(tmp_path / "run")
    assert [row.prompt for row in erased] == ["coffee0.png"]
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["cost/failed"] == 1

    monkeypatch.setattr(NudeNet, "_boxes", lambda self, image: [(24, 8, 36, 22)] if image.mean() > BRIGHT else [])
    run = unlearn(*SMALL, *NUDENET, *photos)
    with (run / "images" / "erased.csv").open(newline="") as file:
        records = {row["prompt"]: json.loads(row["decided"]) for row in csv.DictReader(file)}
    assert records["astronaut0.png"]["boxes"] == [[24, 8, 36, 22]] and records["astronaut0.png"]["chosen"] == 3 * 4
    assert records["coffee0.png"] == {"boxes": [], "cells": 256, "chosen": 0, "changed": 0}
    erased = sorted(list(manifests(run))[1], key=lambda row: row.prompt)
    same = {row.prompt: np.array_equal(load_images([row]), load_images([row], "base")) for row in erased}
    assert same == {"astronaut0.png": False, "coffee0.png": True}, "an image without a box stays unchanged"
    assert json.loads((run / "metrics.json").read_text())["efficacy/unchanged"] == 50, "and is counted as unchanged"
    assert {p.name for p in (run / "images" / "erased").iterdir()} == set(same), "under their own names"
    assert (run / "images" / "erased" / "astronaut0.png").read_bytes() == erased[0].path.read_bytes()


def test_counting_within_boxes_changes_e(vqgan, tmp_path):
    chosen = ["model=emoji_vqgan", f"model.path={vqgan}", "method=lcr", "+detector@method.within=boxes"]
    cfg = config(tmp_path, *chosen, *TOP)
    cfg.dataset.images, cfg.dataset.pictures = 4, 12
    model, task, trainer = (instantiate(part) for part in (cfg.model, cfg.dataset, cfg.trainer))
    within = instantiate(cfg.method, trainer=trainer).fit(model, task)
    cfg.method.within = None
    whole = instantiate(cfg.method, trainer=trainer).fit(model, task)
    assert set(whole.statistics.explicit.tolist()) != set(within.statistics.explicit.tolist())


def test_a_forget_image_that_crashes_the_detector_is_not_counted(vqgan, caplog):
    @dataclass(frozen=True)
    class Crashes(Detector):
        def __call__(self, images, known):
            return [[(0, 0, 64, 64)] if image.any() else 1 / 0 for image in images]

    light, dark = np.full((64, 64, 3), 200, np.uint8), np.zeros((64, 64, 3), np.uint8)
    task = UnlearningTask((Concept("light"),), forget_images=[light, dark, light], retain_images=[dark])
    model, quiet = VQGAN.load(str(vqgan), device="cpu"), {"logger": False, "enable_progress_bar": False}
    frequencies = count_codes(model, task, partial(pl.Trainer, **quiet, accelerator="cpu"), within=Crashes())
    assert frequencies.images == [2, 1] and frequencies.codes.sum(1).tolist() == [2 * 256, 256]
    assert "not counted" in caplog.text


@pytest.mark.parametrize("overrides, hint", [
    (["method.selection.min_freq=1000000", "method=lcr"], "method.selection.min_freq"),
    (["method=lcr", "dataset=emoji_objects"], "dataset="),
    (["method=lcr_localized", "method.detector.concept=catt"], "Did you mean"),
])  # fmt: skip
def test_bad_input_is_reported_before_an_image_is_generated(error_of, tmp_path, overrides, hint):
    unnamed = [o for o in SMALL if o.partition("=")[0] not in {p.partition("=")[0] for p in overrides}]
    assert hint in error_of(*unnamed, "evaluator=[]", *overrides)
    generated = [path for path in (tmp_path / "store").rglob("*.png") if path.parent.name != "inputs"]
    assert not generated or "detector" in overrides[-1]


def test_methods_and_datasets_for_other_models_are_refused(error_of):
    assert "DiffusionModel" in error_of("model=emoji_vqgan", "method=esd_x")
    assert "VQGAN" in error_of("method=lcr")
    assert "prompts" in error_of("dataset=emoji_scenes")


def test_exactly_the_cells_of_a_face_in_a_photograph_are_replaced(vqgan):
    """In a photograph of 256 × 256 pixels, exactly the cells under NudeNet's box get another code."""
    photo = np.asarray(Image.fromarray(photographs.astronaut()).resize((256, 256)))
    model, detector = VQGAN.load(str(vqgan), device="cpu"), NudeNet(classes=("FACE_FEMALE",), min_score=0.5)
    codes = model.encode(as_tensor(photo[None]))
    unseen = next(k for k in range(32) if not (codes == k).any())
    statistics = CodeStatistics(torch.tensor([0]), torch.tensor([unseen]), torch.ones(32))
    with CodebookEdit(statistics, Uniform(), detector).applied_to(model):
        after, (record,) = model.edit(photo[None], codes, [None], [0])
    (box,) = record["boxes"]
    left, top, right, bottom = (side / 4 for side in box)  # a cell is four pixels wide
    rows, columns = np.mgrid[:64, :64]
    under = (columns + 1 > left) & (columns < right) & (rows + 1 > top) & (rows < bottom)
    assert np.array_equal((after != codes)[0].numpy(), under) and 0 < under.mean() < 0.2

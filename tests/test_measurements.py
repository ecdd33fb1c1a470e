"""The metrics that a run stores; failed measurements are reported and never counted as results."""

import json

import nudenet
import pytest

from unlearning.errors import UserError
from unlearning.evaluators.clip_score import CLIPScore
from unlearning.evaluators.nudenet import Counting, NudeNet, recount
from unlearning.store.evaluations import evaluation
from unlearning.store.manifest import ManifestRow

THREE = ["dataset=prompt", "dataset.others=[dog,sky]"]  # three pictures: one of the erased concept
FACE = {"class": "FACE_MALE", "score": 0.5, "box": [0, 0, 8, 8]}


def test_cached_evaluations_are_written_into_every_run(unlearn, monkeypatch):
    calls = []
    monkeypatch.setattr(nudenet.NudeDetector, "detect", lambda self, image: calls.append(image.shape) or [FACE])
    asked = [*THREE, "evaluator=nudenet", "stages=[fit,generate,evaluate]"]
    first = unlearn(*asked, run="first")
    seen = len(calls)
    assert seen >= 1
    second = unlearn(*asked, run="second")
    assert len(calls) == seen, "the second run's pictures are the first's, and so are its measures"
    for run in (first, second):
        lines = (run / "details" / "nudenet-of-erased.jsonl").read_text().splitlines()
        assert [json.loads(line)["found"] for line in lines] == [[FACE]]
        assert json.loads((run / "metrics.json").read_text())["efficacy/nudenet_total"] == 0
        assert recount(run, Counting(("FACE_MALE",), 0.5, "images"))["efficacy/nudenet_total"].value == 1


def test_a_damaged_image_is_reported_and_drawn_again_once_it_is_gone(unlearn, error_of, tmp_path):
    run = unlearn(*THREE, "stages=[fit,generate]")
    picture = next((tmp_path / "store" / "images").rglob("*.png"))
    whole = picture.read_bytes()
    picture.write_bytes(whole[: len(whole) // 2])
    asked = [*THREE, "evaluator=clip_score", "stages=[generate,evaluate]"]
    message = error_of(*asked)
    assert f"{picture} cannot be read" in message and "the same command" in message
    assert not (run / "metrics.json").exists()
    picture.unlink()
    unlearn(*asked)
    assert picture.read_bytes() == whole and (run / "metrics.json").exists()


def test_a_nan_metric_stops_the_run(error_of, tmp_path, monkeypatch):
    monkeypatch.setattr(CLIPScore, "compute", lambda self: {"fidelity/clip_score": float("nan")})
    message = error_of(*THREE, "evaluator=clip_score", "stages=[fit,generate,evaluate]")
    assert "clip_score of base: fidelity/clip_score is nan" in message
    assert not (tmp_path / "run" / "metrics.json").exists()


def test_an_evaluation_of_no_image_is_refused_and_not_kept(tmp_path):
    rows = [ManifestRow(tmp_path / "a.png", "a cat", "erase", {}, 0)]
    for shown, batch_size in (([], 4), (rows, -4)):
        with pytest.raises(UserError, match="no images"):
            evaluation(tmp_path / "store", "cat", shown, NudeNet(), batch_size, {}, "nudenet of base")
    assert not (tmp_path / "store").exists()

"""Whole runs of a tiny model: what they leave, what they do not do twice, and how they survive accidents.

An accident is the real thing where it can be: a SIGINT, a limit on the size of files, a model that changes on disk.
"""

import csv
import errno
import json
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from PIL import Image

from tests import tiny
from unlearning.erasure import Erasure
from unlearning.evaluators.fid import FID
from unlearning.evaluators.nudenet import NudeNet
from unlearning.images import load, read_manifest
from unlearning.methods.esd import ESD
from unlearning.run import alone_in, suppression
from unlearning.sampling.sampler import Sampler

STEPS, PICTURES = 2, 13  # of a picture; of cat: itself, its synonyms, the nine others
FIT = 3  # denoiser evaluations of an iteration of ESD, left where its trajectory begins: student, and teacher twice
EXACT = ["method.trajectory=exact", "method.batch_size=1", "method.steps=1"]
TRAIN = ["method=esd_x", *EXACT, "trainer.callbacks.0.every_n_train_steps=2"]
SMALL = ["dataset=prompt", "dataset.others=[dog,sky]"]  # three prompts


@pytest.fixture
def evaluations(monkeypatch):
    """How many latents have gone through the denoiser: `count()` since the last `count()`."""
    seen = [0]
    forward = UNet2DConditionModel.forward

    def counted(self, sample, *arguments, **keywords):
        seen[0] += len(sample)
        return forward(self, sample, *arguments, **keywords)

    monkeypatch.setattr(UNet2DConditionModel, "forward", counted)

    def count() -> int:
        new, seen[0] = seen[0], 0
        return new

    return count


@pytest.fixture
def model(tmp_path, sd1):
    """A copy of the tiny model that a test may change."""
    return shutil.copytree(sd1, tmp_path / "model")


def pictures(count: int) -> int:
    """The denoiser evaluations of so many guided pictures."""
    return count * STEPS * 2


def at_call(monkeypatch, owner: type, name: str, k: int, happen) -> None:
    """Calls `happen()` instead of the k-th call, from 1, of owner.name."""
    original, calls = getattr(owner, name), [0]

    def call(*arguments, **keywords):
        calls[0] += 1
        return happen() if calls[0] == k else original(*arguments, **keywords)

    monkeypatch.setattr(owner, name, call)


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def files(folder: Path) -> dict[str, int]:
    """Every file below a folder with the time it was last written."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def drawn(store: Path) -> dict[str, int]:
    """The pictures among them."""
    return {name: time for name, time in files(store).items() if name.endswith(".png")}


def partial(folder: Path) -> list[str]:
    return [str(p) for p in folder.rglob("*partial*")]


# --- a run from its first stage to its last ---------------------------------------------------------------------------


def test_a_run_leaves_what_is_documented_and_does_nothing_twice(unlearn, tmp_path, evaluations):
    command = [*TRAIN, "method.iterations=3", "evaluator=nudenet", "logger=csv"]
    run = unlearn(*command)
    assert evaluations() == 3 * FIT + 2 * pictures(PICTURES)

    left = {p for p in files(run) if not p.startswith("logs/")}
    assert left - {"__main__.log"} == {
        *(f".hydra/{name}.yaml" for name in ("config", "hydra", "overrides")),
        *(f"erasure/{name}" for name in ("README.md", "erasure.json", "weights.safetensors")),
        *("images/base.csv", "images/erased.csv", "metrics.json", "cost.json", "report.html", "teaser.png", ".lock"),
        *("details/nudenet-of-base.jsonl", "details/nudenet-of-erased.jsonl"),
        *("provenance.json", ".finished", *([".fit"] if (run / ".fit").exists() else [])),
    }
    assert not partial(tmp_path)
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"efficacy/nudenet_total", "base/efficacy/nudenet_total", "efficacy/nudenet_total/protocol"} <= set(metrics)
    assert metrics["cost/denoiser_evaluations"] == 3 * FIT and metrics["cost/artefact_bytes"] > 10_000
    cost = json.loads((run / "cost.json").read_text())
    assert {k: v["denoiser_evaluations"] for k, v in cost.items()} == {
        "fit": 3 * FIT, "generate base": pictures(PICTURES), "generate erased": pictures(PICTURES)
    }  # fmt: skip
    base, erased = (read_manifest(run / "images" / f"{name}.csv") for name in ("base", "erased"))
    assert [(r.prompt, r.seed, r.role) for r in base] == [(r.prompt, r.seed, r.role) for r in erased]
    assert len({r.path for r in base + erased}) == 2 * PICTURES == len(list((tmp_path / "store").rglob("*.png")))
    assert load(base).shape == (PICTURES, 16, 16, 3) and (load(base) != load(erased)).any()
    [log] = run.glob("logs/csv/*/metrics.csv")
    losses = [float(row["train/loss"]) for row in csv.DictReader(log.open()) if row.get("train/loss")]
    assert len(losses) == 3 and np.isfinite(losses).all()

    before, shared = files(run), files(tmp_path / "store")
    unlearn(*command)
    assert evaluations() == 0, "nothing is fitted or drawn again"
    assert files(tmp_path / "store") == shared, "nothing of the store is written again"
    after = files(run)
    assert {p: after[p] for p in before if p.startswith("erasure/")} == {
        p: t for p, t in before.items() if p.startswith("erasure/")
    }
    assert json.loads((run / "metrics.json").read_text()).keys() == metrics.keys()


def test_runs_share_the_base_models_pictures_and_their_measures(unlearn, tmp_path, evaluations):
    none = unlearn("method=none", "evaluator=nudenet", run="none")
    assert evaluations() == pictures(PICTURES), "a model that nothing was erased from is the base model"
    base, erased = (read_manifest(none / "images" / f"{name}.csv") for name in ("base", "erased"))
    assert base == erased and base[0].base is None
    negative = unlearn("method=negative_prompt", run="negative")
    assert evaluations() == pictures(PICTURES), "only the erased model's are drawn"
    assert load(read_manifest(negative / "images" / "base.csv")).any()
    assert read_manifest(negative / "images" / "base.csv") == read_manifest(none / "images" / "base.csv")
    unlearn("method=none", "concept=dog", run="dog")
    assert evaluations() == pictures(3), "of dog's thirteen prompts, cat's run had all but dog's synonyms"


def test_other_settings_have_other_pictures(unlearn, tmp_path, evaluations):
    few = [*SMALL, "method=none"]
    unlearn(*few)
    evaluations()
    for setting in ("seed=1", "sampler.steps=3", "sampler.guidance_scale=5", "model.dtype=bfloat16"):
        unlearn(*few, setting, run=setting.partition("=")[0])
        assert evaluations() > 0, setting
    unlearn(*few, "sampler.batch_size=1", run="alone")
    assert evaluations() == 0, "a batch's size changes no picture"


def test_a_batch_changes_no_picture(unlearn, tmp_path):
    a = load(read_manifest(unlearn(*SMALL, "sampler.batch_size=3") / "images" / "base.csv"))
    shutil.rmtree(tmp_path / "store")
    b = load(read_manifest(unlearn(*SMALL, "sampler.batch_size=1") / "images" / "base.csv"))
    assert np.abs(a.astype(int) - b).max() <= 1 and len(np.unique(a[:, 0, 0, 0])) > 1


def test_stages_can_be_run_one_by_one(unlearn, evaluations):
    run = unlearn(*SMALL, *TRAIN, "method.iterations=1", "stages=[fit]")
    assert evaluations() == FIT and not (run / "images").exists()
    unlearn(*SMALL, *TRAIN, "method.iterations=1", "stages=[generate]")
    assert evaluations() == 2 * pictures(3) and not (run / "metrics.json").exists()
    unlearn(*SMALL, *TRAIN, "method.iterations=1", "stages=[report,evaluate]")  # their order is the stages' own
    assert evaluations() == 0 and (run / "report.html").exists()


@pytest.mark.parametrize(
    ("stages", "answer"),
    [
        ("[evaluate]", "run the generate stage first"),
        ("[generate]", "run the fit stage first"),
        ("[report]", "run the evaluate stage"),
        ("[fitt]", "There is no stage 'fitt'; there are fit, generate, evaluate, report."),
    ],
)
def test_a_stage_whose_turn_has_not_come_says_which_is_missing(told, stages, answer):
    assert answer in told(*SMALL, f"stages={stages}")


def test_an_evaluation_survives_a_new_report_and_notices_a_new_protocol(unlearn, monkeypatch):
    updates = []
    update = NudeNet.update
    monkeypatch.setattr(NudeNet, "update", lambda self, *a: (updates.append(1), update(self, *a)))
    command = [*SMALL, "method=none", "evaluator=nudenet"]
    unlearn(*command)
    assert len(updates) == 1, "base and unedited are the same pictures"
    unlearn(*command)
    assert len(updates) == 1
    unlearn(*command, "evaluator.nudenet.threshold=0.5")
    assert len(updates) == 2


class Colours:
    """A feature extractor: the mean colour."""

    name = "mean colour"

    def __init__(self, path: str):
        pass

    def __call__(self, images):
        return images.float().mean((1, 2))


def test_a_folder_of_ones_own_is_erased_and_measured(unlearn, tmp_path, monkeypatch, evaluations):
    (tmp_path / "mugs").mkdir()
    for i in range(12):
        Image.new("RGB", (9, 9), (20 * i, 9 * i, i * i)).save(tmp_path / "mugs" / f"{i:02}.png")
    (tmp_path / "mugs" / "zz.png").write_bytes(b"no picture")
    fid = ["evaluator=fid", "judge.features._target_=tests.test_run.Colours", "evaluator.fid.count=7"]
    command = [
        "dataset=folder",
        "concept=mug",
        f"forget={tmp_path}/mugs",
        "dataset.size=16",
        *fid,
        "dataset.images_per_prompt=4",
    ]
    with pytest.warns(UserWarning, match=r"1 of 13 pictures cannot be read and are left out: .*zz\.png"):
        run = unlearn(*command, "method=negative_prompt")
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["fidelity/fid_e"] > 0 and "fidelity/fid" not in metrics, "there are no pictures to retain"
    evaluations()
    updates = []
    monkeypatch.setattr(FID, "update", lambda self, *a: updates.append(a))
    unlearn(*command, "method=negative_prompt", "sampler.batch_size=3")
    assert evaluations() == 0 and not updates, "nothing is measured again"


# --- nothing stale ----------------------------------------------------------------------------------------------------


def test_a_model_that_changed_on_disk_is_fitted_and_drawn_anew(unlearn, model, evaluations):
    command = [*SMALL, *TRAIN, "method.iterations=3", f"model.path={model}"]
    run = unlearn(*command)
    first = evaluations()
    old = Erasure.load(run / "erasure"), read_manifest(run / "images" / "erased.csv")
    tiny.pipeline("sd1", seed=1).save_pretrained(model)
    unlearn(*command)
    assert evaluations() == first
    new = Erasure.load(run / "erasure"), read_manifest(run / "images" / "erased.csv")
    assert old[0].fingerprint != new[0].fingerprint and (load(old[1]) != load(new[1])).any()
    assert json.loads((run / "metrics.json").read_text())["cost/denoiser_evaluations"] == 3 * FIT, "the new fit's"


def test_an_interrupted_fit_does_not_go_on_with_another_model(unlearn, told, model, monkeypatch, evaluations):
    command = [*SMALL, *TRAIN, "method.iterations=5", f"model.path={model}", "stages=[fit]"]
    with monkeypatch.context() as patch:
        at_call(patch, ESD, "loss", 4, ctrl_c)
        told(*command)
    evaluations()
    tiny.pipeline("sd1", seed=1).save_pretrained(model)
    unlearn(*command)
    assert evaluations() == 5 * FIT


@pytest.mark.parametrize(
    "change", ["method.eta=3", "concept=bird", "seed=1", "method=uce", "dataset.template='the {}'"]
)
def test_changed_settings_in_the_same_folder_are_fitted_anew(unlearn, change):
    unlearn(*SMALL, *TRAIN, "method.iterations=1", "stages=[fit]", run="same")
    old = Erasure.load((run := unlearn(*SMALL, "stages=[]", run="same")) / "erasure").fingerprint
    method = [] if change.startswith("method=") else [*TRAIN, "method.iterations=1"]
    unlearn(*SMALL, *method, "stages=[fit]", change, run="same")
    assert Erasure.load(run / "erasure").fingerprint != old


def test_what_changes_no_erasure_is_not_fitted_anew(unlearn, evaluations):
    command = [*SMALL, *TRAIN, "method.iterations=1", "stages=[fit]"]
    unlearn(*command)
    evaluations()
    unlearn(*command, "dataset.images_per_prompt=2", "dataset.others=[ship]", "sampler.steps=5", "evaluator=nudenet")
    assert evaluations() == 0


# --- Ctrl-C in every stage, then the same command again ---------------------------------------------------------------


def test_an_interrupted_fit_goes_on_from_its_checkpoint(unlearn, told, tmp_path, monkeypatch, evaluations):
    command = [*SMALL, *TRAIN, "method.iterations=9"]
    left = 9
    for k, done in ((4, 2), (4, 4), (1, 4)):  # interrupted in call k; steps that checkpoints have kept by then
        with monkeypatch.context() as patch:
            at_call(patch, ESD, "loss", k, ctrl_c)
            assert "Interrupted. The same command goes on from here." in told(*command)
        run, kept = tmp_path / "run", tmp_path / "run" / "checkpoints"
        assert not (run / "erasure").exists() and not partial(tmp_path)
        assert [p.name for p in kept.iterdir() if p.suffix == ".ckpt"] == ["last.ckpt"]
        assert torch.load(kept / "last.ckpt", weights_only=False)["global_step"] == done
        left = 9 - done
    evaluations()
    unlearn(*command, "stages=[fit]")
    assert evaluations() == left * FIT
    assert not kept.exists(), "the erasure takes the checkpoints' place"
    unlearn(*command)
    assert evaluations() == 2 * pictures(3) and (run / "report.html").exists()
    cost = json.loads((run / "cost.json").read_text())["fit"]["denoiser_evaluations"]
    assert cost == (3 + 3 + 0 + left) * FIT, "an interrupted fit costs what all its sittings cost"


def test_an_interrupted_generation_draws_only_what_is_missing(unlearn, told, tmp_path, monkeypatch, evaluations):
    command = ["method=negative_prompt"]
    with monkeypatch.context() as patch:
        at_call(patch, Sampler, "draw", 2, ctrl_c)
        assert "Interrupted" in told(*command)
    store, run = tmp_path / "store" / "images", tmp_path / "run"
    first = drawn(store)
    assert len(first) == 4 and not partial(tmp_path) and not (run / "images").exists()
    assert evaluations() == pictures(4)
    with monkeypatch.context() as patch:
        at_call(patch, Sampler, "draw", 5, ctrl_c)  # three batches are left of the base model's pictures
        assert "Interrupted" in told(*command)
    assert evaluations() == pictures(9 + 4) and not (run / "images").exists()
    unlearn(*command)
    assert evaluations() == pictures(9)
    assert first.items() <= drawn(store).items() and len(drawn(store)) == 2 * PICTURES
    assert (run / "report.html").exists()


def test_an_interrupted_evaluation_is_made_again_and_nothing_else(unlearn, told, tmp_path, monkeypatch, evaluations):
    command = ["method=negative_prompt", "evaluator=nudenet"]
    updates = []
    update = NudeNet.update
    monkeypatch.setattr(NudeNet, "update", lambda self, *a: (updates.append(1), update(self, *a)))
    with monkeypatch.context() as patch:
        at_call(patch, NudeNet, "update", 6, ctrl_c)  # the base model's four batches, and one of the erased model's
        assert told(*command) == "Interrupted. The same command goes on from here."
    assert not (tmp_path / "run" / "metrics.json").exists() and not partial(tmp_path) and len(updates) == 5
    evaluations()
    run = unlearn(*command)
    assert evaluations() == 0 and len(updates) == 5 + 4
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"efficacy/nudenet_total", "base/efficacy/nudenet_total"} <= metrics.keys() and (
        run / "report.html"
    ).exists()


def test_an_interrupted_report_is_written_again(unlearn, told, tmp_path, monkeypatch, evaluations):
    replace = Path.replace

    def interrupted(self, target):
        return ctrl_c() if target.name == "report.html" else replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        told(*SMALL)
    run = tmp_path / "run"
    assert (run / "metrics.json").exists() and not (run / "report.html").exists() and not partial(tmp_path)
    evaluations()
    unlearn(*SMALL)
    assert evaluations() == 0 and "</html>" in (run / "report.html").read_text()


# --- a loss that is no number -----------------------------------------------------------------------------------------


def finite(checkpoint: Path) -> bool:
    weights = torch.load(checkpoint, weights_only=False)["state_dict"]
    return len(weights) > 0 and all(torch.isfinite(w).all() for w in weights.values())


def test_a_loss_that_is_no_number_stops_the_fit(told, tmp_path, monkeypatch):
    at_call(monkeypatch, ESD, "loss", 4, lambda: torch.tensor(float("nan"), requires_grad=True))
    said = told(*SMALL, *TRAIN, "method.iterations=9")
    assert "The loss is nan at step 3." in said and "method.optimizer.lr" in said
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=False)["global_step"] == 2 and finite(last)
    assert not (tmp_path / "run" / "erasure").exists() and not partial(tmp_path)


@pytest.mark.parametrize("iterations", [1, 4])
def test_weights_that_are_no_numbers_are_never_kept(told, tmp_path, iterations):
    said = told(
        *SMALL, *TRAIN, f"method.iterations={iterations}", "method.optimizer.lr=inf",
        "trainer.callbacks.0.every_n_train_steps=1",
    )  # fmt: skip
    assert "The weights are not finite at step 1." in said and "method.optimizer.lr" in said
    assert all(finite(p) for p in tmp_path.rglob("*.ckpt"))
    assert not (tmp_path / "run" / "erasure").exists() and not partial(tmp_path)


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "left"),  # and how many pictures are still to be drawn; the fit itself is in its last checkpoint
    [("cost.json", 6), ("weights.safetensors", 6), ("erasure.json", 6), (".png", 6), ("base.csv", 0),
     ("evaluations", 0), ("metrics.json", 0), ("report.html", 0)],
)  # fmt: skip
def test_a_full_disk_leaves_nothing_half_written(unlearn, told, tmp_path, monkeypatch, evaluations, name, left):
    command = [*SMALL, *TRAIN, "method.iterations=1", "evaluator=nudenet"]
    write_bytes = Path.write_bytes

    def full(self, content):
        if name in str(self.relative_to(tmp_path)):
            write_bytes(self, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return write_bytes(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        said = told(*command)
    assert "No space left on device" in said and "the same command goes on from here" in said
    assert not partial(tmp_path)
    assert not [p for p in files(tmp_path) if name in p], "neither half a file nor one of that name"
    evaluations()
    run = unlearn(*command)
    assert evaluations() == pictures(left)
    assert (run / "report.html").exists()


def test_weights_that_do_not_fit_on_the_disk_leave_no_erasure(unlearn, told, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, hard))  # the system refuses to write more
    try:
        said = told(*SMALL, "method=uce", "stages=[fit]")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in said and "the same command goes on from here" in said
    assert not (tmp_path / "run" / "erasure").exists() and not partial(tmp_path)
    assert (unlearn(*SMALL, "method=uce", "stages=[fit]") / "erasure").exists()


def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_one_before(unlearn, told, tmp_path, monkeypatch):
    command = [*SMALL, *TRAIN, "method.iterations=9", "stages=[fit]"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    loss = ESD.loss

    def shrinking(self, prompts):
        if self.global_step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, hard))
        return loss(self, prompts)

    with monkeypatch.context() as patch:
        patch.setattr(ESD, "loss", shrinking)
        try:
            said = told(*command)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "the same command goes on from here" in said
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=False)["global_step"] == 2 and finite(last)
    unlearn(*command)


# --- two runs in one folder -------------------------------------------------------------------------------------------


def test_a_folder_takes_one_run_at_a_time(unlearn, told, tmp_path, evaluations):
    with alone_in(tmp_path / "run"):
        assert f"Another run is at work in {tmp_path / 'run'}" in told(*SMALL)
        assert evaluations() == 0 and not (tmp_path / "store").exists()
        unlearn(*SMALL, run="another")
    assert (unlearn(*SMALL) / "report.html").exists()


def test_a_run_that_is_refused_leaves_the_others_record_alone(unlearn, told, tmp_path):
    run = unlearn(*SMALL, "stages=[fit]")
    with alone_in(run):
        before = files(run / ".hydra")
        told(*SMALL, "seed=1")
        assert files(run / ".hydra") == before
    assert "seed: 0" in (run / ".hydra" / "config.yaml").read_text()


def test_an_interrupted_run_frees_its_folder(told, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, Sampler, "draw", 1, ctrl_c)
        told(*SMALL)
    with alone_in(tmp_path / "run"):
        pass


# --- numbers of the whole run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"efficacy/acc_e": 5.0, "base/efficacy/acc_e": 50.0}, 90.0),
        ({"efficacy/nudenet_rate": 3.0, "base/efficacy/nudenet_rate": 4.0, "efficacy/acc_e": 0.0}, 25.0),
        ({"efficacy/acc_e": 5.0, "base/efficacy/acc_e": 0.0}, None),
        ({}, None),
    ],
)
def test_suppression_is_the_share_of_the_base_models_that_is_gone(metrics, expected):
    assert suppression(metrics).get("efficacy/suppression") == expected

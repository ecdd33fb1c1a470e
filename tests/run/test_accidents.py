"""How whole runs survive accidents.

Where possible the accident is real: a SIGINT, a limit on the size of files.
"""

import errno
import fcntl
import json
import os
import resource
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from pytorch_lightning.utilities import rank_zero_only

from tests.run.small import (
    EXACT,
    FIT,
    PICTURES,
    SMALL,
    TRAIN,
    at_call,
    ctrl_c,
    files,
    image_evaluations,
    image_files,
    no_dog_can_be_drawn,
    partial,
)
from unlearning.erasures.base import Erasure
from unlearning.evaluators.nudenet import NudeNet
from unlearning.methods.esd import ESD
from unlearning.methods.scrubber import Scrubber
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.sampler import Sampler
from unlearning.scrubbing import words as word_search
from unlearning.store import locks, loops
from unlearning.store.locks import alone_in
from unlearning.store.manifest import read_manifest


def last_checkpoint(run: Path) -> Path:
    """The one checkpoint that a run keeps, under the key of its fit."""
    [last] = (run / "checkpoints").glob("*/*.ckpt")
    assert last.name == "last.ckpt"
    return last


def step_of(checkpoint: Path) -> int:
    return torch.load(checkpoint, weights_only=False)["global_step"]


# --- Ctrl-C in every stage, then the same command again ---------------------------------------------------------------


def test_an_interrupted_fit_resumes_from_its_checkpoint(unlearn, error_of, tmp_path, monkeypatch, evaluations):
    command = [*SMALL, *TRAIN, "method.iterations=9"]
    left = 9
    for k, done in ((4, 2), (4, 4), (1, 4)):  # interrupted in call k; steps that checkpoints have kept by then
        with monkeypatch.context() as patch:
            at_call(patch, ESD, "loss", k, ctrl_c)
            assert "Interrupted" in error_of(*command)
        run, kept = tmp_path / "run", tmp_path / "run" / "checkpoints"
        assert not (run / "erasure").exists() and not partial(tmp_path)
        assert step_of(last_checkpoint(run)) == done
        left = 9 - done
    evaluations()
    unlearn(*command, "stages=[fit]")
    assert evaluations() == left * FIT
    assert not kept.exists(), "the erasure takes the checkpoints' place"
    unlearn(*command)
    assert evaluations() == 2 * image_evaluations(3) and (run / "report.html").exists()
    cost = json.loads((run / "cost.json").read_text())["fit"]["denoiser_evaluations"]
    assert cost == (3 + 3 + 0 + left) * FIT, "an interrupted fit costs what all its starts cost"


SCRUB = [
    "method=scrubber", "dataset=emoji_objects", "dataset.pictures=6", "model.path=${paths.weights}/emoji_unet",
    "method.conditioning=null", "method.prototypes.K=4", "method.prototypes.purity=0", "method.prototypes.draws=1",
    "method.batch_size=4",
]  # fmt: skip
REUSE = ["dataset=prompt", "method.trajectory=reuse", "method.steps=4", "method.batch_size=1"]  # four points at a time


@pytest.mark.parametrize(
    ("owner", "command"),
    [(ESD, ["dataset=prompt", "method=esd_x", *EXACT]), (ESD, [*REUSE, "method=esd_x"]), (Scrubber, SCRUB),
     (ESD, [*REUSE, "method=unguide", "+trainer.accumulate_grad_batches=2"])],
)  # fmt: skip
def test_an_interrupted_fit_ends_as_one_that_was_not(unlearn, error_of, tmp_path, monkeypatch, owner, command):
    """The checkpoint is from step 2, within the first pool of points and the first epoch of images."""
    command = [*command, "method.iterations=5", "trainer.callbacks.0.every_n_train_steps=2", "stages=[fit]"]
    whole, calls = unlearn(*command, run="apart/whole"), 8 if "+trainer.accumulate_grad_batches=2" in command else 4
    with monkeypatch.context() as patch:
        at_call(patch, owner, "loss", calls, ctrl_c)
        assert "Interrupted" in error_of(*command)
    assert step_of(last_checkpoint(tmp_path / "run")) == 2
    again = unlearn(*command)
    [one], [other] = (list((run / "erasure").glob("*.safetensors")) for run in (whole, again))
    assert one.read_bytes() == other.read_bytes()


def test_an_interrupted_search_of_a_closed_form_resumes(unlearn, error_of, tmp_path, monkeypatch, evaluations):
    """Four prompts are compared on 16 samples each, which are two batches."""
    monkeypatch.setattr(word_search, "FINAL_SAMPLES", 16)
    monkeypatch.setattr(loops, "EVERY", 0)
    command = [*SCRUB[1:4], *SCRUB[5:-1], "method=words_solve", "method.words=[cat,dog,key]", "stages=[fit]"]
    whole, _ = unlearn(*command, run="apart/whole"), evaluations()
    with monkeypatch.context() as patch:
        at_call(patch, StableDiffusion, "to_x0", 2, ctrl_c)
        assert "Interrupted" in error_of(*command)
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    before = evaluations()
    again = unlearn(*command)
    assert evaluations() == before - 32, "the first batch is not computed again"
    assert not (again / "checkpoints").exists()
    [one], [other] = (list((run / "erasure").glob("*.safetensors")) for run in (whole, again))
    assert one.read_bytes() == other.read_bytes()


def test_an_interrupted_generation_draws_only_what_is_missing(unlearn, error_of, tmp_path, monkeypatch, evaluations):
    command = ["method=negative_prompt"]
    with monkeypatch.context() as patch:
        at_call(patch, Sampler, "draw", 2, ctrl_c)
        assert "Interrupted" in error_of(*command)
    store, run = tmp_path / "store" / "images", tmp_path / "run"
    first = image_files(store)
    assert len(first) == 4 and not partial(tmp_path) and not (run / "images").exists()
    assert evaluations() == image_evaluations(4)
    with monkeypatch.context() as patch:
        at_call(patch, Sampler, "draw", 5, ctrl_c)  # three batches are left of the base model's pictures
        assert "Interrupted" in error_of(*command)
    assert evaluations() == image_evaluations(9 + 4) and not (run / "images").exists()
    unlearn(*command)
    assert evaluations() == image_evaluations(9)
    assert first.items() <= image_files(store).items() and len(image_files(store)) == 2 * PICTURES
    assert (run / "report.html").exists()


def test_an_image_with_nan_is_a_failure_and_not_a_black_image(error_of, tmp_path, monkeypatch):
    no_dog_can_be_drawn(monkeypatch)
    said = error_of(*SMALL, "method=negative_prompt")
    assert "images that could not be generated: 1" in said
    rows = read_manifest(tmp_path / "run" / "images" / "base.csv")
    assert len(rows) == 2 and not any("dog" in row.prompt for row in rows)
    assert len(image_files(tmp_path / "store" / "images")) == 2 * 2


def test_an_interrupted_evaluation_is_made_again_and_nothing_else(
    unlearn, error_of, tmp_path, monkeypatch, evaluations
):
    command = ["method=negative_prompt", "evaluator=nudenet"]
    updates = []
    update = NudeNet.update
    monkeypatch.setattr(NudeNet, "update", lambda self, *a: (updates.append(1), update(self, *a)))
    with monkeypatch.context() as patch:
        at_call(patch, NudeNet, "update", 6, ctrl_c)  # the base model's four batches, and one of the erased model's
        assert "Interrupted" in error_of(*command)
    assert not (tmp_path / "run" / "metrics.json").exists() and not partial(tmp_path) and len(updates) == 5
    evaluations()
    run = unlearn(*command)
    assert evaluations() == 0 and len(updates) == 5 + 4
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"efficacy/nudenet_total", "base/efficacy/nudenet_total"} <= metrics.keys() and (
        run / "report.html"
    ).exists()


def test_an_interrupted_report_is_written_again(unlearn, error_of, tmp_path, monkeypatch, evaluations):
    replace = Path.replace

    def interrupted(self, target):
        return ctrl_c() if target.name == "report.html" else replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", interrupted)
        error_of(*SMALL)
    run = tmp_path / "run"
    assert (run / "metrics.json").exists() and not (run / "report.html").exists() and not partial(tmp_path)
    evaluations()
    unlearn(*SMALL)
    assert evaluations() == 0 and "</html>" in (run / "report.html").read_text()


# --- a loss that is no number -----------------------------------------------------------------------------------------


def finite(checkpoint: Path) -> bool:
    weights = torch.load(checkpoint, weights_only=False)["state_dict"]
    return len(weights) > 0 and all(torch.isfinite(w).all() for w in weights.values())


def test_a_nan_loss_stops_the_fit(error_of, tmp_path, monkeypatch):
    at_call(monkeypatch, ESD, "loss", 4, lambda: torch.tensor(float("nan"), requires_grad=True))
    said = error_of(*SMALL, *TRAIN, "method.iterations=9")
    assert "The loss is nan at step 3." in said and "method.optimizer.lr" in said
    last = last_checkpoint(tmp_path / "run")
    assert step_of(last) == 2 and finite(last)
    assert not (tmp_path / "run" / "erasure").exists() and not partial(tmp_path)


@pytest.mark.parametrize("iterations", [1, 4])
def test_weights_with_nan_are_never_saved(error_of, tmp_path, monkeypatch, iterations):
    step = torch.optim.Adam.step

    def overflowing(self, closure=None):
        loss = step(self, closure)
        for weight in self.param_groups[0]["params"]:
            weight.data.fill_(torch.inf)
        return loss

    monkeypatch.setattr(torch.optim.Adam, "step", overflowing)
    said = error_of(*SMALL, *TRAIN, f"method.iterations={iterations}", "trainer.callbacks.0.every_n_train_steps=1")
    assert "The weights are not finite at step 1." in said and "method.optimizer.lr" in said
    assert all(finite(p) for p in tmp_path.rglob("*.ckpt"))
    assert not (tmp_path / "run" / "erasure").exists() and not partial(tmp_path)


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "left"),  # and the evaluations still to be done; a fit that has begun is in its last checkpoint
    [("cost.json", FIT + image_evaluations(6)), ("weights.safetensors", image_evaluations(6)),
     (".png", image_evaluations(6)),
     ("evaluations", 0), ("report.html", 0)],
)  # fmt: skip
def test_a_full_disk_leaves_nothing_half_written(unlearn, error_of, tmp_path, monkeypatch, evaluations, name, left):
    command = [*SMALL, *TRAIN, "method.iterations=1", "evaluator=nudenet"]
    write_bytes = Path.write_bytes

    def full(self, content):
        if name in str(self.relative_to(tmp_path)):
            write_bytes(self, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return write_bytes(self, content)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        said = error_of(*command)
    assert "No space left on device" in said and "the same command goes on from here" in said
    assert not partial(tmp_path)
    assert not [p for p in files(tmp_path) if name in p], "neither half a file nor one of that name"
    evaluations()
    run = unlearn(*command)
    assert evaluations() == left
    assert (run / "report.html").exists()


def test_weights_that_do_not_fit_on_the_disk_leave_no_erasure(unlearn, error_of, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, hard))  # the system refuses to write more
    try:
        said = error_of(*SMALL, "method=uce", "stages=[fit]")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in said and "the same command goes on from here" in said
    assert not (tmp_path / "run" / "erasure").exists() and not partial(tmp_path)
    assert (unlearn(*SMALL, "method=uce", "stages=[fit]") / "erasure").exists()


@pytest.mark.parametrize("limit", [4_000, 12_000, 30_000])  # bytes: within a tensor, or before all of them
def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_one_before(
    unlearn, error_of, tmp_path, monkeypatch, limit
):
    command = [*SMALL, *TRAIN, "method.iterations=9", "stages=[fit]"]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    loss = ESD.loss

    def shrinking(self, prompts):
        if self.global_step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        return loss(self, prompts)

    with monkeypatch.context() as patch:
        patch.setattr(ESD, "loss", shrinking)
        try:
            said = error_of(*command)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in said and "the same command goes on from here" in said
    last = last_checkpoint(tmp_path / "run")
    assert step_of(last) == 2 and finite(last)
    unlearn(*command)


# --- two runs in one folder -------------------------------------------------------------------------------------------


def test_a_folder_takes_one_run_at_a_time(unlearn, error_of, tmp_path, evaluations):
    with alone_in(tmp_path / "run"):
        assert f"Another run is at work in {tmp_path / 'run'}" in error_of(*SMALL)
        assert evaluations() == 0 and not (tmp_path / "store").exists()
        unlearn(*SMALL, run="another")
    assert (unlearn(*SMALL) / "report.html").exists()


def test_a_refused_run_does_not_change_the_record_of_the_active_run(unlearn, error_of, tmp_path):
    run = unlearn(*SMALL, "stages=[fit]")
    with alone_in(run):
        before = files(run / ".hydra")
        error_of(*SMALL, "seed=1")
        assert files(run / ".hydra") == before
    assert "seed: 0" in (run / ".hydra" / "config.yaml").read_text()


def test_an_interrupted_run_frees_its_folder(error_of, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, Sampler, "draw", 1, ctrl_c)
        error_of(*SMALL)
    with alone_in(tmp_path / "run"):
        pass


# --- processes of one launcher that have nothing to do with each other ------------------------------------------------


def test_a_run_that_srun_starts_beside_others_is_a_run_of_its_own(unlearn, error_of, tmp_path, monkeypatch):
    monkeypatch.setattr(rank_zero_only, "rank", 1)  # as Lightning reads it from SLURM_PROCID when it is imported
    for name, value in {"NTASKS": 2, "PROCID": 1, "LOCALID": 1, "NODEID": 0, "JOB_ID": 7, "NNODES": 1}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    command = [*SMALL, *TRAIN, "method.iterations=3"]
    with monkeypatch.context() as patch:
        at_call(patch, ESD, "loss", 3, ctrl_c)
        error_of(*command)
    assert step_of(last_checkpoint(tmp_path / "run")) == 2
    with alone_in(tmp_path / "run"):
        assert "Another run is at work" in error_of(*command)
    assert {"metrics.json", "report.html", ".finished", "cost.json"} <= files(unlearn(*command)).keys()


def test_a_run_on_a_file_system_without_locks_warns_once_and_ends(unlearn, monkeypatch, capfd):
    """As Lustre without flock, or NFS with nolock."""

    def flock(*_) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    locks._warn_of_no_locks.cache_clear()
    monkeypatch.setattr(fcntl, "flock", flock)
    command = [*SMALL, *TRAIN, "method.iterations=1", "evaluator=nudenet"]
    assert (unlearn(*command) / "report.html").exists()
    assert (unlearn(*command, "sampler.steps=1") / "report.html").exists(), "the same folder again"
    assert "".join(capfd.readouterr()).count(os.strerror(errno.ENOSYS)) == 1


# --- damaged checkpoints ----------------------------------------------------------------------------------------------


def test_a_damaged_checkpoint_is_set_aside_and_the_fit_begins_again(
    unlearn, error_of, tmp_path, monkeypatch, evaluations
):
    command = [*SMALL, *TRAIN, "method.iterations=3", "stages=[fit]"]
    with monkeypatch.context() as patch:
        at_call(patch, ESD, "loss", 3, ctrl_c)
        error_of(*command)
    last = last_checkpoint(tmp_path / "run")
    last.write_bytes(last.read_bytes()[: last.stat().st_size // 2])
    evaluations()
    assert (unlearn(*command) / "erasure").exists()
    assert evaluations() == 3 * FIT


def test_an_unreadable_record_of_a_fit_causes_a_new_fit(unlearn, evaluations):
    command = [*SMALL, *TRAIN, "method.iterations=1", "stages=[fit]"]
    run = unlearn(*command)
    (run / ".fit").write_bytes(b"\xff\xfe")
    (run / ".finished").unlink()
    evaluations()
    unlearn(*command)
    assert evaluations() == FIT and (run / ".fit").read_text()


def test_checkpoints_are_written_beside_their_target(unlearn, error_of, tmp_path, monkeypatch):
    """And not into TMPDIR, which may be on another file system."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))
    (tmp_path / "full").mkdir(mode=0o500)
    at_call(monkeypatch, ESD, "loss", 3, ctrl_c)
    monkeypatch.setattr(shutil, "move", lambda *a, **k: 1 / 0)
    assert "Interrupted" in error_of(*SMALL, *TRAIN, "method.iterations=3", "stages=[fit]")
    assert step_of(last_checkpoint(tmp_path / "run")) == 2 and not list((tmp_path / "full").iterdir())


# --- damaged state files, edits, a store that can only be read --------------------------------------------------------


def test_damaged_state_files_are_made_again(unlearn, tmp_path):
    command = [*SMALL, "method=uce", "evaluator=nudenet"]
    run = unlearn(*command)
    metrics = json.loads((run / "metrics.json").read_text())
    costs = metrics["cost/denoiser_evaluations/protocol"]
    metrics = {name: value for name, value in metrics.items() if not name.startswith("cost/")}
    state = [run / name for name in (".finished", "cost.json", "provenance.json", "metrics.json")]
    state += [path for place in ("evaluations", "images") for path in (tmp_path / "store" / place).rglob("*.json")]
    assert {"about.json"} < {path.name for path in state}
    for i, path in enumerate([*state, run / "erasure" / "erasure.json"]):
        path.write_text(("", "{", "[1]")[i % 3])
    unlearn(*command)
    again = json.loads((run / "metrics.json").read_text())
    assert metrics.items() <= again.items() and Erasure.load(run / "erasure").weights
    assert (run / "erasure.damaged").exists() and (run / "cost.json.damaged").exists()
    assert again["cost/denoiser_evaluations/protocol"] == costs, "the first fit is not counted in"
    for path in (path for path in state if not path.is_relative_to(tmp_path / "store" / "images")):
        assert json.loads(path.read_text()), f"{path} is whole"


def test_an_erasure_without_its_erasure_json_is_made_again(unlearn, evaluations):
    command = [*SMALL, *TRAIN, "method.iterations=1"]
    run = unlearn(*command)
    (run / "erasure" / "erasure.json").unlink()
    evaluations()
    unlearn(*command)
    assert evaluations() == FIT and Erasure.load(run / "erasure").weights


def test_an_edited_metrics_json_is_measured_again(unlearn):
    command = [*SMALL, "evaluator=nudenet"]
    run = unlearn(*command)
    whole = (run / "metrics.json").read_bytes()
    (run / "metrics.json").write_text(json.dumps({"efficacy/nudenet_total": 0}))
    unlearn(*command)
    assert (run / "metrics.json").read_bytes() == whole


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("version https://git-lfs.github.com")])
def test_a_finished_run_without_its_tensors_is_not_skipped(unlearn, error_of, damage):
    command = [*SMALL, "method=uce"]
    weights = unlearn(*command) / "erasure" / "weights.safetensors"
    whole = weights.read_bytes()
    damage(weights)
    assert str(weights) in error_of(*command)
    weights.write_bytes(whole)
    assert (unlearn(*command) / "report.html").exists()


@pytest.mark.parametrize("why", [errno.EROFS, errno.EACCES])
def test_a_run_works_with_a_read_only_store(unlearn, error_of, tmp_path, monkeypatch, why):
    unlearn(*SMALL, run="runs/first")
    open_, mkdir = Path.write_bytes, Path.mkdir

    def guarded(original):
        def call(self, *arguments, **keywords):
            if self.is_relative_to(tmp_path / "store") and not (original is mkdir and self.exists()):
                raise OSError(why, os.strerror(why), str(self))
            return original(self, *arguments, **keywords)

        return call

    monkeypatch.setattr(Path, "write_bytes", guarded(open_))
    monkeypatch.setattr(Path, "mkdir", guarded(mkdir))
    assert (unlearn(*SMALL, f"paths.runs={tmp_path}/other", run="other/second") / "report.html").exists()
    said = error_of(*SMALL, "sampler.steps=1", f"paths.runs={tmp_path}/other", run="other/third")
    assert os.strerror(why) in said and "paths.store=" in said, "images are missing in it"

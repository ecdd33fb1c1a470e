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

import numpy as np
import pytest
import torch
from PIL import Image
from pytorch_lightning.utilities import rank_zero_only

from tests.run.small import (
    FIT,
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
    command = [*SMALL, *TRAIN, "method.iterations=5"]
    whole, _ = unlearn(*command, "stages=[fit]", run="apart/whole"), evaluations()
    run, kept = tmp_path / "run", tmp_path / "run" / "checkpoints"
    for k, done in ((4, 2), (3, 4)):  # interrupted in call k; steps that checkpoints have kept by then
        with monkeypatch.context() as patch:
            at_call(patch, ESD, "loss", k, ctrl_c)
            assert "Interrupted" in error_of(*command)
        assert not (run / "erasure").exists() and not partial(tmp_path)
        assert step_of(last_checkpoint(run)) == done
    assert evaluations() == (3 + 2) * FIT
    unlearn(*command)
    assert evaluations() == FIT + 2 * image_evaluations(3) and (run / "report.html").exists()
    assert not kept.exists(), "the erasure takes the checkpoints' place"
    cost = json.loads((run / "cost.json").read_text())["fit"]["denoiser_evaluations"]
    assert cost == (3 + 2 + 1) * FIT, "an interrupted fit costs what all its starts cost"
    assert weights_of(run) == weights_of(whole)


def weights_of(run: Path) -> bytes:
    """The file of an erasure's weights."""
    [file] = (run / "erasure").glob("*.safetensors")
    return file.read_bytes()


SCRUB = [
    "dataset=folder", "dataset.size=16", "method.prototypes.K=2",
    "method.prototypes.purity=0", "method.prototypes.draws=1", "method.prototypes.layer=null",
]  # fmt: skip
REUSE = ["dataset=prompt", "method.trajectory=reuse", "method.steps=4", "method.batch_size=1"]  # four points at a time


@pytest.fixture
def photographs(tmp_path) -> list[str]:
    """Two folders of ten images of noise."""
    for seed, place in enumerate(("forget", "retain")):
        (tmp_path / place).mkdir()
        for i, pixels in enumerate(np.random.default_rng(seed).integers(0, 255, (10, 16, 16, 3), np.uint8)):
            Image.fromarray(pixels).save(tmp_path / place / f"{i}.png")
    return [f"forget={tmp_path}/forget", f"retain={tmp_path}/retain"]


@pytest.mark.parametrize(
    ("owner", "calls", "command"),
    [
        (Scrubber, 4, [*SCRUB, "method=scrubber", "method.conditioning=null", "method.batch_size=2"]),
        (ESD, 8, [*REUSE, "method=unguide", "+trainer.accumulate_grad_batches=2"]),
    ],
)
def test_an_interrupted_fit_ends_as_one_that_was_not(
    unlearn, error_of, tmp_path, monkeypatch, photographs, owner, calls, command
):
    """The checkpoint is from step 2, within the first pool of points and the first epoch of images."""
    images = photographs if owner is Scrubber else []
    command = [*command, *images, "method.iterations=4", "trainer.callbacks.0.every_n_train_steps=2", "stages=[fit]"]
    whole = unlearn(*command, run="apart/whole")
    with monkeypatch.context() as patch:
        at_call(patch, owner, "loss", calls, ctrl_c)
        assert "Interrupted" in error_of(*command)
    assert step_of(last_checkpoint(tmp_path / "run")) == 2
    assert weights_of(unlearn(*command)) == weights_of(whole)


def test_an_interrupted_search_of_a_closed_form_resumes(
    unlearn, error_of, tmp_path, monkeypatch, evaluations, photographs
):
    """Four prompts are compared on 16 samples each, which are two batches."""
    monkeypatch.setattr(word_search, "FINAL_SAMPLES", 16)
    monkeypatch.setattr(loops, "EVERY", 0)
    command = [*SCRUB, *photographs, "method=words_solve", "method.words=[cat,dog,key]", "stages=[fit]"]
    whole, _ = unlearn(*command, run="apart/whole"), evaluations()
    with monkeypatch.context() as patch:
        at_call(patch, StableDiffusion, "to_x0", 2, ctrl_c)
        assert "Interrupted" in error_of(*command)
    assert list((tmp_path / "run" / "checkpoints").iterdir())
    before = evaluations()
    again = unlearn(*command)
    assert evaluations() == before - 32, "the first batch is not computed again"
    assert not (again / "checkpoints").exists()
    assert weights_of(again) == weights_of(whole)


def test_later_stages_resume_where_they_were_interrupted(unlearn, error_of, tmp_path, monkeypatch, evaluations):
    """Interrupted while the base model's images are drawn, the erased model's, in the evaluation, and in the report."""
    command = [*SMALL, "method=negative_prompt", "evaluator=nudenet", "sampler.batch_size=2"]
    store, run, updates = tmp_path / "store" / "images", tmp_path / "run", []
    update, replace = NudeNet.update, Path.replace

    def interrupted(owner: type, name: str, k: int) -> None:
        with monkeypatch.context() as patch:
            at_call(patch, owner, name, k, ctrl_c)
            assert "Interrupted" in error_of(*command)
        assert not partial(tmp_path)

    interrupted(Sampler, "draw", 2)
    first = image_files(store)
    assert len(first) == 2 and not (run / "images").exists() and evaluations() == image_evaluations(2)
    interrupted(Sampler, "draw", 3)  # one batch is left of the base model's images
    assert evaluations() == image_evaluations(1 + 2) and not (run / "images").exists()

    monkeypatch.setattr(NudeNet, "update", lambda self, *a: (updates.append(1), update(self, *a)))
    interrupted(NudeNet, "update", 4)  # the base model's two batches, and one of the erased model's
    assert evaluations() == image_evaluations(1) and first.items() <= image_files(store).items()
    assert len(image_files(store)) == 2 * 3 and len(updates) == 3 and not (run / "metrics.json").exists()

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda self, to: ctrl_c() if to.name == "report.html" else replace(self, to))
        assert "Interrupted" in error_of(*command)
    assert evaluations() == 0 and len(updates) == 3 + 2 and not partial(tmp_path)
    assert {"efficacy/nudenet_total", "base/efficacy/nudenet_total"} <= json.loads(
        (run / "metrics.json").read_text()
    ).keys()
    assert not (run / "report.html").exists()
    unlearn(*command)
    assert evaluations() == 0 and len(updates) == 3 + 2 and "</html>" in (run / "report.html").read_text()


def test_an_image_with_nan_is_a_failure_and_not_a_black_image(error_of, tmp_path, monkeypatch):
    no_dog_can_be_drawn(monkeypatch)
    said = error_of(*SMALL, "method=negative_prompt", "evaluator=nudenet")
    assert "images that could not be generated: 1" in said
    rows = read_manifest(tmp_path / "run" / "images" / "base.csv")
    assert len(rows) == 2 and not any("dog" in row.prompt for row in rows)
    assert len(image_files(tmp_path / "store" / "images")) == 2 * 2
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    protocols = [value for key, value in metrics.items() if key.endswith("/protocol") and "nudenet" in key]
    assert len(protocols) > 6 and all(p.endswith(", images that could not be generated: 1") for p in protocols)


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


def test_weights_with_nan_are_never_saved(error_of, tmp_path, monkeypatch):
    step = torch.optim.Adam.step

    def overflowing(self, closure=None):
        loss = step(self, closure)
        for weight in self.param_groups[0]["params"]:
            weight.data.fill_(torch.inf)
        return loss

    monkeypatch.setattr(torch.optim.Adam, "step", overflowing)
    said = error_of(*SMALL, *TRAIN, "method.iterations=2", "trainer.callbacks.0.every_n_train_steps=1")
    assert "The weights are not finite at step 1." in said and "method.optimizer.lr" in said
    assert all(finite(p) for p in tmp_path.rglob("*.ckpt"))
    assert not (tmp_path / "run" / "erasure").exists() and not partial(tmp_path)


# --- a full disk ------------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_nothing_half_written(unlearn, error_of, tmp_path, monkeypatch, evaluations):
    """In one stage after the other. A fit that has begun is in its last checkpoint."""
    command = [*SMALL, *TRAIN, "method.iterations=1", "evaluator=nudenet"]
    write_bytes = Path.write_bytes

    def full(self, content):
        if name in str(self.relative_to(tmp_path)):
            write_bytes(self, content[: len(content) // 2])
            raise OSError(errno.ENOSPC, "No space left on device", str(self))
        return write_bytes(self, content)

    begins = [("cost.json", 0), ("weights.safetensors", FIT), (".png", image_evaluations(3)),
              ("evaluations", image_evaluations(6)), ("report.html", 0)]  # fmt: skip
    for name, done in begins:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "write_bytes", full)
            said = error_of(*command)
        assert "No space left on device" in said and "the same command goes on from here" in said
        assert not partial(tmp_path)
        assert not [p for p in files(tmp_path) if name in p], "neither half a file nor one of that name"
        assert evaluations() == done, name
    assert (unlearn(*command) / "report.html").exists() and evaluations() == 0


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


@pytest.mark.parametrize("limit", [4_000, 30_000])  # bytes: within a tensor, or before all of them
def test_a_checkpoint_that_does_not_fit_on_the_disk_leaves_the_one_before(
    unlearn, error_of, tmp_path, monkeypatch, limit
):
    command = [*SMALL, *TRAIN, "method.iterations=4", "stages=[fit]"]
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
    """A refused run leaves the record of the run at work alone; an interrupted one, above, has freed its folder."""
    run = unlearn(*SMALL, "stages=[fit]")
    with alone_in(run):
        before = files(run / ".hydra")
        assert f"Another run is at work in {run}" in error_of(*SMALL, "seed=1")
        assert files(run / ".hydra") == before and "seed: 0" in (run / ".hydra" / "config.yaml").read_text()
        assert evaluations() == 0 and not (tmp_path / "store").exists()
        unlearn(*SMALL, "stages=[fit]", run="another")
    assert (unlearn(*SMALL) / "report.html").exists()


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


def test_a_damaged_record_of_a_fit_or_of_an_erasure_causes_a_new_fit(unlearn, evaluations):
    command = [*SMALL, *TRAIN, "method.iterations=1", "stages=[fit]"]
    run = unlearn(*command)
    (run / ".fit").write_bytes(b"\xff\xfe")
    (run / ".finished").unlink()
    evaluations()
    unlearn(*command)
    assert evaluations() == FIT and (run / ".fit").read_text()
    (run / "erasure" / "erasure.json").unlink()
    unlearn(*command)
    assert evaluations() == FIT and Erasure.load(run / "erasure").weights


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

    whole = (run / "metrics.json").read_bytes()
    (run / "metrics.json").write_text(json.dumps({"efficacy/nudenet_total": 0}))
    unlearn(*command)
    assert (run / "metrics.json").read_bytes() == whole, "what was edited is measured again"


def test_a_finished_run_without_its_tensors_is_not_skipped(unlearn, error_of):
    command = [*SMALL, "method=uce", "stages=[fit,generate]"]
    weights = unlearn(*command) / "erasure" / "weights.safetensors"
    weights.write_text("version https://git-lfs.github.com")
    assert str(weights) in error_of(*command)
    weights.unlink()
    assert str(weights) in error_of(*command)


def test_a_run_works_with_a_read_only_store(unlearn, error_of, tmp_path, monkeypatch):
    unlearn(*SMALL, run="runs/first")
    why = errno.EROFS
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

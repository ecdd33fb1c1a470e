"""trainer=ddp on two processes of one machine: the run that one process makes, shared out."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import unlearning
from unlearning.erasures.base import Erasure
from unlearning.methods.scrubber import Scrubber
from unlearning.store.manifest import load_images, read_manifest

RUN = [
    "concept=cat", "method=esd_x", "method.trajectory=exact", "method.iterations=2", "method.steps=2",
    "method.batch_size=1", "sampler.steps=2", "sampler.batch_size=2", "dataset=prompt_list", "evaluator=[clip_score]",
    "logger=csv", "model.device=cpu", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false",
    "trainer.callbacks.1._target_=pytorch_lightning.Callback", "~trainer.callbacks.1.refresh_rate",
]  # fmt: skip


def test_two_processes_make_one_run(sd1, tmp_path):
    """Every picture is drawn, once, and is the one that a single process draws with that erasure.

    The erasure is the one that a process finds alone that accumulates two batches.
    """
    command = [sys.executable, "-m", "unlearning", *RUN, f"model.path={sd1}", f"hydra.run.dir={tmp_path}/run"]
    two = [*command, "trainer=ddp", "trainer.devices=2", f"paths.store={tmp_path}/two"]
    done = subprocess.run(two, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    shared = read_manifest(tmp_path / "run" / "images" / "erased.csv")
    assert len(shared) == 20 and all(row.path.exists() for row in shared)
    assert (tmp_path / "run" / "report.html").exists()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["efficacy/clip_score_e"] >= 0

    last = shared[-1].path
    last.unlink()
    (tmp_path / "run" / ".finished").unlink()
    done = subprocess.run([*two, "stages=[generate]"], capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0 and last.exists(), "two processes draw a single image" + done.stderr[-3000:]

    accumulated = ["+trainer.accumulate_grad_batches=2", "stages=[fit]", f"hydra.run.dir={tmp_path}/alone"]
    subprocess.run([*command[:-1], *accumulated], capture_output=True, text=True, timeout=240, cwd=tmp_path, check=True)
    found, expected = (Erasure.load(tmp_path / run / "erasure").weights for run in ("run", "alone"))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-7)

    one = [*command, f"paths.store={tmp_path}/one", "stages=[generate]"]  # of the erasure that the two have found
    subprocess.run(one, capture_output=True, text=True, timeout=240, cwd=tmp_path, check=True)
    alone = read_manifest(tmp_path / "run" / "images" / "erased.csv")
    assert [(r.prompt, r.seed) for r in alone] == [(r.prompt, r.seed) for r in shared]
    assert (abs(load_images(alone).astype(int) - load_images(shared)) <= 1).all()


def test_the_processes_that_srun_starts_make_one_run(sd1, tmp_path):
    """SLURM's variables are those of `srun --ntasks=2`; with trainer=ddp its tasks are the ranks of one run."""
    command = [
        sys.executable, "-m", "unlearning", *RUN, f"model.path={sd1}", f"hydra.run.dir={tmp_path}/run",
        f"paths.store={tmp_path}/store", "trainer=ddp", "trainer.devices=2", "dataset=prompt", "dataset.others=[dog]",
        "dataset.images_per_prompt=2",
    ]  # fmt: skip
    slurm = {"NTASKS": 2, "NTASKS_PER_NODE": 2, "NODEID": 0, "NNODES": 1, "JOB_ID": os.getpid(), "JOB_NAME": "a job",
             "NODELIST": "localhost", "JOB_NODELIST": "localhost"}  # fmt: skip
    ranks = []
    for task in range(2):
        own = {f"SLURM_{name}": str(value) for name, value in {**slurm, "PROCID": task, "LOCALID": task}.items()}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        ranks.append(subprocess.Popen(command, env=os.environ | own, cwd=tmp_path, **pipes))
    said = [rank.communicate(timeout=240)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], said
    assert sum("report.html" in text for text in said) == 1, "one of them reports"
    drawn = read_manifest(tmp_path / "run" / "images" / "erased.csv")
    assert len(drawn) == 4 and all(row.path.exists() for row in drawn)
    assert Erasure.load(tmp_path / "run" / "erasure").weights


class Watched(Scrubber):
    """Leaves what each process found, which pictures it saw and what it came to."""

    def on_fit_start(self) -> None:
        self.saw = []

    def _search(self, *latents):
        torch.manual_seed(self.global_rank)  # left to themselves they would not find the same
        return super()._search(*latents)

    def loss(self, batch) -> torch.Tensor:
        self.saw.append(batch["forget"][0])
        return super().loss(batch)

    def on_train_end(self) -> None:
        moved = {name: p.detach() for name, p in self.weights.items()}
        torch.save((self.prototypes.directions, self.saw, moved), f"rank{self.global_rank}.pt")


def test_two_processes_scrub_together_and_gather_gradients(tmp_path):
    """Each has the same prototypes, learns from pictures of its own, and ends with the same weights."""
    command = [
        sys.executable, "-m", "unlearning", "concept=cat", "method=scrubber", "method.iterations=2",
        "method._target_=tests.test_distributed.Watched", "method.batch_size=2", "method.conditioning=null",
        "method.prototypes.K=8", "method.prototypes.purity=0", "method.prototypes.draws=1", "dataset.pictures=8",
        "stages=[fit]", "trainer=ddp", "trainer.devices=2", "+trainer.accumulate_grad_batches=2",
        "trainer.precision=bf16-mixed", *RUN[-6:], f"hydra.run.dir={tmp_path}/run",
    ]  # fmt: skip
    root = Path(__file__).parents[1]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(root)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (found, saw, moved), (theirs, they_saw, they_moved) = (torch.load(tmp_path / f"rank{i}.pt") for i in range(2))
    assert torch.equal(found, theirs)
    assert len(saw) == len(they_saw) == 4, "two steps of two batches"
    assert not any(torch.equal(z, other) for z in torch.cat(saw[:2]) for other in torch.cat(they_saw[:2]))
    assert all(torch.equal(p, they_moved[name]) for name, p in moved.items())
    weights = Path(unlearning.__file__).parent / "weights"
    before = DiffusionPipeline.from_pretrained(weights / "emoji_unet").unet.state_dict()
    learned = Erasure.load(tmp_path / "run" / "erasure").weights
    assert all(p.isfinite().all() for p in learned.values())
    assert any(not torch.equal(p, before[name.removeprefix("unet.")].to(p)) for name, p in learned.items())


def test_two_processes_count_the_codes_of_a_single_image(vqgan, tmp_path):
    for folder, count in (("forget", 1), ("retain", 3)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            pixels = np.random.default_rng([count, i]).integers(0, 256, (64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{i}.png")
    command = [
        sys.executable, "-m", "unlearning", "model=emoji_vqgan", "method=lcr", "method.selection.top=2", "concept=cat",
        "dataset=folder", f"forget={tmp_path}/forget", f"retain={tmp_path}/retain", f"input={tmp_path}/retain",
        f"model.path={vqgan}", "stages=[fit]", *RUN[-6:],
    ]  # fmt: skip
    for name, more in (("alone", []), ("two", ["trainer=ddp", "trainer.devices=2"])):
        whole = [*command, f"hydra.run.dir={tmp_path}/{name}", *more]
        done = subprocess.run(whole, capture_output=True, text=True, timeout=240, cwd=tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
    alone, two = (Erasure.load(tmp_path / name / "erasure") for name in ("alone", "two"))
    assert two.digest == alone.digest

"""trainer=ddp with two processes on one machine gives the same run as one process."""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import unlearning
from tests.processes import COMMAND_LINE, Started
from unlearning.erasures.base import Erasure
from unlearning.errors import UserError
from unlearning.methods.scrubber import Scrubber
from unlearning.store.manifest import load_images, read_manifest
from unlearning.training.trainers import share_batches

RUN = [
    "concept=cat", "method=esd_x", "method.trajectory=exact", "method.iterations=2", "method.steps=2",
    "method.batch_size=1", "sampler.steps=2", "sampler.batch_size=2", "dataset=prompt_list", "evaluator=[clip_score]",
    "logger=csv", "model.device=cpu", "trainer.accelerator=cpu", "trainer.enable_progress_bar=false",
    "trainer.callbacks.1._target_=pytorch_lightning.Callback", "~trainer.callbacks.1.refresh_rate",
]  # fmt: skip
TWO = ["trainer=ddp", "trainer.devices=2", "trainer.accumulate_grad_batches=2"]


def test_two_processes_make_one_run(unlearn, tmp_path):
    """Every image is generated once, and equals the image of a single process with that erasure.

    The erasure is the one that a single process finds with the same batches.
    """
    two = Started(COMMAND_LINE, unlearn.arguments(*RUN, *TWO))
    assert two.wait() == 0, two.stderr[-3000:]
    shared = read_manifest(tmp_path / "run" / "images" / "erased.csv")
    assert len(shared) == 20 and all(row.path.exists() for row in shared)
    assert (tmp_path / "run" / "report.html").exists()
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["efficacy/clip_score_e"] >= 0

    alone = unlearn(*RUN, "+trainer.accumulate_grad_batches=2", "stages=[fit]", run="alone")
    found, expected = (Erasure.load(run / "erasure").weights for run in (tmp_path / "run", alone))
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-7)

    one = unlearn(*RUN, f"paths.store={tmp_path}/one", "stages=[generate]")  # of the erasure that the two have found
    drawn = read_manifest(one / "images" / "erased.csv")
    assert [(r.prompt, r.seed) for r in drawn] == [(r.prompt, r.seed) for r in shared]
    assert (abs(load_images(drawn).astype(int) - load_images(shared)) <= 1).all()


@pytest.mark.parametrize("batches", [1, 3])
def test_batches_that_two_processes_cannot_share_are_refused(batches):
    with pytest.raises(UserError, match=f"trainer.accumulate_grad_batches={batches}"):
        share_batches(SimpleNamespace(accumulate_grad_batches=batches, world_size=2))


RACING = """
import runpy, sys
from unlearning.stages import generation
from unlearning.store import ranks

every = generation.missing
generation.missing = lambda rows: every(rows) if ranks.first_rank() else []
runpy.run_module("unlearning", run_name="__main__", alter_sys=True)
"""


def srun(code: str, command: list[str], cwd: Path | None = None) -> list[Started]:
    """Two tasks, with the variables that SLURM gives them: with trainer=ddp they are the ranks of one run."""
    slurm = {"NTASKS": 2, "NTASKS_PER_NODE": 2, "NODEID": 0, "NNODES": 1, "JOB_ID": os.getpid(), "JOB_NAME": "a job",
             "NODELIST": "localhost", "JOB_NODELIST": "localhost"}  # fmt: skip
    ranks = []
    for task in range(2):
        own = {f"SLURM_{name}": str(value) for name, value in {**slurm, "PROCID": task, "LOCALID": task}.items()}
        ranks.append(Started(code, command, cwd, own))
    assert [rank.wait() for rank in ranks] == [0, 0], [rank.stderr[-3000:] for rank in ranks]
    return ranks


def test_the_processes_that_srun_starts_make_one_run_even_of_a_single_image(unlearn, tmp_path):
    command = unlearn.arguments(*RUN, *TWO, "dataset=prompt", "dataset.others=[]", "evaluator=[]")
    ranks = srun(COMMAND_LINE, command)
    assert sum("report.html" in rank.stdout for rank in ranks) == 1, "one of them reports"
    drawn = read_manifest(tmp_path / "run" / "images" / "erased.csv")
    assert len(drawn) == 1 and all(row.path.exists() for row in drawn)
    assert Erasure.load(tmp_path / "run" / "erasure").weights


def test_a_process_that_sees_no_missing_image_still_generates_its_share(unlearn, tmp_path):
    """As where another run has made the images since the first process has looked."""
    few = ["concept=cat", "method=none", "dataset=prompt", "dataset.others=[]", "stages=[fit,generate]"]
    srun(RACING, unlearn.arguments(*few, *TWO, *RUN[-5:]))
    drawn = read_manifest(tmp_path / "run" / "images" / "erased.csv")
    assert len(drawn) == 1 and all(row.path.exists() for row in drawn)


def test_two_processes_attack_one_model(unlearn, tmp_path):
    attack = ["attack=[unlearndiffatk/nudity]", "attack.unlearndiffatk.iterations=1", "attack.unlearndiffatk.times=2"]
    few = ["concept=cat", "method=negative_prompt", "dataset=prompt", "stages=[fit,attack,generate]", *attack]
    srun(COMMAND_LINE, unlearn.arguments(*few, *TWO, *RUN[-5:]))
    assert json.loads((tmp_path / "run" / "attacks" / "unlearndiffatk.json").read_text())["rows"]
    assert len(read_manifest(tmp_path / "run" / "images" / "attacked-unlearndiffatk.csv")) == 1
    assert not list((tmp_path / "run").glob(".attack-*")), "each process has deleted its own state"


class Watched(Scrubber):
    """Writes the prototypes, the training images and the final weights of each process."""

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
    """All processes have the same prototypes, train on different images, and end with the same weights."""
    command = [
        "concept=cat", "method=scrubber", "method.iterations=2",
        "method._target_=tests.test_distributed.Watched", "method.batch_size=2", "method.conditioning=null",
        "method.prototypes.K=8", "method.prototypes.purity=0", "method.prototypes.draws=1", "dataset.pictures=8",
        "stages=[fit]", *TWO[:2], "trainer.accumulate_grad_batches=4",
        "trainer.precision=bf16-mixed", *RUN[-6:], f"hydra.run.dir={tmp_path}/run",
    ]  # fmt: skip
    srun(COMMAND_LINE, command, cwd=tmp_path)
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


def test_two_processes_count_the_codes_of_a_single_image(unlearn, tmp_path):
    for folder, count in (("forget", 1), ("retain", 3)):
        (tmp_path / folder).mkdir()
        for i in range(count):
            pixels = np.random.default_rng([count, i]).integers(0, 256, (64, 64, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / folder / f"{i}.png")
    command = [
        "model=emoji_vqgan", "method=lcr", "method.selection.top=2", "concept=cat", "dataset=folder",
        f"forget={tmp_path}/forget", f"retain={tmp_path}/retain", f"input={tmp_path}/retain", "stages=[fit]", *RUN[-6:],
    ]  # fmt: skip
    alone = unlearn(*command, run="alone")
    srun(COMMAND_LINE, unlearn.arguments(*command, *TWO, run="two"))
    assert Erasure.load(tmp_path / "two" / "erasure").digest == Erasure.load(alone / "erasure").digest

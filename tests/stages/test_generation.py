"""Generation with too little memory, and with a signal in the middle of a batch."""

import signal
import time
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import nn

from unlearning.errors import UserError
from unlearning.stages.generation import generate
from unlearning.store.manifest import ManifestRow, missing


class Model:
    """A model that calls its network at each step."""

    def __init__(self):
        self.network = nn.Identity()


class Steps:
    """A sampler of grey images that runs out of memory for larger batches."""

    def __init__(self, most: int = 100, step=lambda i: None, steps: int = 1, automatic: bool = False):
        self.most, self.step, self.steps, self.sizes = most, step, steps, []
        self.batch_size, self.automatic = 8, automatic

    def draw(self, model, rows):
        self.sizes.append(len(rows))
        if len(rows) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        for i in range(self.steps):
            self.step(i)
            model.network(torch.zeros(1))
        return torch.full((len(rows), 3, 8, 8), 0.5), [{}] * len(rows)


@pytest.fixture
def rows(tmp_path):
    return [ManifestRow(tmp_path / f"{i}.png", "a cat", "erase", {}, i) for i in range(20)]


@pytest.fixture
def trainer(tmp_path):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    return partial(pl.Trainer, accelerator="cpu", default_root_dir=tmp_path, **quiet)


def test_out_of_memory_halves_the_batch_with_a_warning(rows, trainer, caplog):
    sampler = Steps(most=4)
    generate(Model(), sampler, rows, trainer)
    assert not missing(rows) and sampler.sizes == [8, 4, 4, 4, 4, 4]
    [warning] = [record for record in caplog.records if record.name == "unlearning.stages.generation"]
    assert "sampler.batch_size=4" in warning.getMessage()


def test_out_of_memory_at_the_smallest_batch_names_the_setting(rows, trainer):
    with pytest.raises(UserError, match=r"sampler\.batch_size"):
        generate(Model(), Steps(most=3), rows, trainer)


def test_an_automatic_batch_is_halved_until_it_fits_and_stays_so(rows, trainer, tmp_path):
    sampler = Steps(most=2, automatic=True)
    generate(Model(), sampler, rows, trainer)
    assert not missing(rows) and sampler.sizes == [8, 4, *[2] * 10]
    more = [ManifestRow(tmp_path / f"more{i}.png", "a cat", "erase", {}, i) for i in range(4)]
    generate(Model(), sampler, more, trainer)
    assert sampler.sizes[12:] == [2, 2]
    with pytest.raises(UserError, match="for 1 images at once"):
        generate(Model(), Steps(most=0, automatic=True), [ManifestRow(tmp_path / "last.png", "", "", {}, 0)], trainer)


def test_sigterm_ends_a_batch_at_its_next_step(rows, trainer):
    def step(i: int) -> None:
        if i == 3:
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.05)
        assert i <= 3, "it went on"

    with pytest.raises(SIGTERMException):
        generate(Model(), Steps(step=step, steps=50), rows, trainer)
    assert len(missing(rows)) == len(rows)

"""What the rows of the GPU table share: the models, the clock and the memory, and what a row is."""

import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from experiments.gpu import architectures
from unlearning.concepts import ERASE, Concept, Prompt, UnlearningTask
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.vqgan import VQGAN
from unlearning.tracking.cost import peak_resident, reset_peak_resident

CAT = "a photo of the cat"

Run = Callable[[], float]  # one turn of one side; returns seconds for each unit


@dataclass(frozen=True)
class Sides:
    """What a row compares.

    Args:
        ours, theirs: Build a side, and return its `Run`. What they build is counted in their memory.
        flops: Of one unit of ours, for the utilisation; None where it is not asked for.
    """

    ours: Callable[[], Run]
    theirs: Callable[[], Run]
    flops: float | None = None


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Args:
        name: Unique; what is measured: what it is compared with.
        unit: What the seconds are for.
        seconds: An estimate of the whole row's time on an H100. No more turns start after it, but two are always made.
        sides: Builds the row's models.
        goal: For its ratio ("×") or its memory.
    """

    name: str
    unit: str
    seconds: float
    sides: Callable[["Bench"], Sides]
    goal: str = ""


@dataclass(frozen=True)
class Size:
    """How much a row computes."""

    turns: int = 3  # of each side, after one to warm up
    steps: int = 20  # of sampling
    trajectory: int = 50  # steps of a training's trajectories, as published
    iterations: int = 3  # in a turn of training
    pictures: int = 2  # that the other side draws one a call
    images: int = 512  # whose codes are counted
    pngs: int = 512  # whose features are found
    workers: int = 12  # of clean-fid


TINY = Size(turns=2, steps=1, trajectory=1, iterations=1, pictures=1, images=4, pngs=3, workers=0)


class Bench:
    """What the rows share: the device, the models' size, and the task."""

    def __init__(self, device: str, tiny: bool):
        self.device, self.tiny, self.size = device, tiny, TINY if tiny else Size()
        self.folder = Path(tempfile.mkdtemp(prefix="gpu-"))

    def model(self, name: str, dtype: torch.dtype = torch.float32) -> DiffusionModel:
        """A model of a published architecture, or of a tiny one of its family, with random weights."""
        if not self.tiny:
            return architectures.diffusion(name, device=self.device, dtype=dtype)
        from tests import tiny

        family = {"SD1.4": "sd1", "SDXL": "sdxl", "SD3-medium": "sd3", "FLUX.1-dev": "flux"}[name]
        pipe = tiny.pipeline(family).to(self.device, dtype)
        pipe.set_progress_bar_config(disable=True)
        return tiny.FAMILIES[family](pipe, name=name, fingerprint="tiny", device=torch.device(self.device))

    def vqgan(self) -> VQGAN:
        if not self.tiny:
            return architectures.gumbel_f8(device=self.device)
        from tests import tiny

        return VQGAN(tiny.vqgan().to(self.device), name="VQ-GAN", fingerprint="tiny", device=torch.device(self.device))

    def few(self, count: int) -> int:
        """A batch size or a number of concepts, or 2 at most for the tiny models."""
        return min(2, count) if self.tiny else count

    @property
    def words(self) -> list[str]:
        """A hundred names of concepts."""
        return ["".join(letters) for letters in islice(product(ascii_lowercase, repeat=3), self.few(100))]

    def task(self, **images: Any) -> UnlearningTask:
        return UnlearningTask((Concept("cat", anchor="sky"),), prompts=(Prompt(CAT, ERASE),), **images)

    def images(self, count: int, side: int) -> list[np.ndarray]:
        return [*np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)]

    def trainer(self, **settings: Any) -> pl.Trainer:
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        accelerator = torch.device(self.device).type
        return pl.Trainer(accelerator=accelerator, devices=1, **dict.fromkeys(quiet, False), **settings)

    @cached_property
    def peak_flops(self) -> float:
        """Operations a second in a product of two square bf16 matrices: what utilisation is a share of."""
        n = 8192 if self.device == "cuda" else 64
        a, b = torch.randn(2, n, n, device=self.device, dtype=torch.bfloat16)
        each = self.clocked(lambda: [a @ b for _ in range(20)], 20)
        return 2 * n**3 / min(each() for _ in range(3))

    def synchronise(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def clocked(self, call: Callable[[], object], units: int = 1) -> Run:
        """Seconds of a call for each of the `units` that it makes."""

        def run() -> float:
            self.synchronise()
            start = time.perf_counter()
            call()
            self.synchronise()
            return (time.perf_counter() - start) / units

        return run

    def stepping(self, make: Callable, call: Callable[[Callable], object], units: int) -> Run:
        """As `clocked`, from the making of an optimizer to its last step: iterations without preparations.

        Args:
            make: Makes an optimizer.
            call: Is given a function like `make`.
        """

        def run() -> float:
            times: list[float] = []

            def stamp(*_: object) -> None:
                self.synchronise()
                times.append(time.perf_counter())

            def watched(parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
                stamp()
                optimizer = make(parameters)
                optimizer.register_step_post_hook(stamp)
                return optimizer

            call(watched)
            return (times[-1] - times[0]) / units

        return run

    def allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.device == "cuda" else 0

    def with_peak(self, run: Run, held: int) -> float:
        """Bytes at most during a run, less what the other side holds; on a CPU, of the whole process."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            run()
            return torch.cuda.max_memory_allocated() - held
        reset_peak_resident()
        run()
        return peak_resident() or float("nan")

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        torch.compiler.reset()


def flops_of(call: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


# The rows.

"""Speed and memory at the size of Stable Diffusion 1.4 and of larger models: make gpu, or python -m experiments.gpu

Each row measures ours and the published way in one process, by turns (A B A B ...), and is written to disk at once. A
rerun goes on with the rows that are missing. A new row is a function that returns the two sides, and a line in ROWS.
"""

import argparse
import gc
import json
import logging
import re
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice, product
from pathlib import Path
from string import ascii_lowercase
from typing import Any

import diffusers
import numpy as np
import pytorch_lightning as pl
import torch
from cleanfid.fid import get_folder_features
from PIL import Image
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import inception_v3

from experiments.gpu import architectures
from experiments.speed import published
from unlearning.attacks.cce import CCE, Observed
from unlearning.attacks.unlearndiffatk import UnlearnDiffAtk
from unlearning.codes.frequency import count_codes
from unlearning.concepts import ERASE, Concept, Prompt, UnlearningTask
from unlearning.data.generated import Generated
from unlearning.data.references import of_folder
from unlearning.judges.inception import Inception
from unlearning.methods.base import TrainedMethod
from unlearning.methods.esd import ESD
from unlearning.methods.rece import RECE
from unlearning.methods.scrubber import Scrubber
from unlearning.methods.speed import SPEED
from unlearning.methods.spm import SPM
from unlearning.methods.uce import UCE
from unlearning.methods.unguide import UnGuide
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.flux import Flux
from unlearning.models.vqgan import VQGAN
from unlearning.sampling.sampler import Sampler
from unlearning.scrubbing.prototypes import PrototypeSearch
from unlearning.store.files import write_atomically
from unlearning.store.manifest import ManifestRow
from unlearning.tracking.cost import peak_resident, reset_peak_resident
from unlearning.tracking.provenance import hardware
from unlearning.training.batches import seed_of
from unlearning.training.student import LoRA, Weights

MINUTES = 8.5  # for the whole table; a row whose estimate does not fit is left to the next run
ATTENTION = r"attn2|\.add_"  # the weights that ESD-x trains
KEYS_VALUES = r"attn2\.to_(k|v)$|add_(k|v)_proj$"  # UnGuide's layers
BLOCKS = r"attentions\.\d+\."  # SPM's: beside every linear map and convolution in them
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


TINY = Size(turns=2, steps=2, trajectory=2, iterations=1, pictures=1, images=4, pngs=3, workers=0)


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


def generation(
    bench: Bench,
    *,
    name: str = "SD1.4",
    dtype: torch.dtype = torch.bfloat16,
    batch: int,
    compiled: bool = False,
    one_a_call: bool = False,
    theirs: torch.dtype | None = None,
) -> Sides:
    """Images of one batch of our sampler: of diffusers' pipeline with the same batch, or one a call in `theirs`."""
    model, batch, steps = bench.model(name, dtype), bench.few(batch), bench.size.steps
    guided = not isinstance(model, Flux)  # which has its guidance scale as an input, and one evaluation a step
    prompts, seeds = [CAT] * batch, list(range(batch))

    def sampler(steps: int) -> Sampler:
        return Sampler(steps=steps, guidance_scale=7.5 if guided else 1.0, batch_size=batch)

    first, second = (flops_of(lambda n=n: sampler(n)(model, prompts, seeds)) for n in (1, 2))
    if compiled and not bench.tiny:  # compiling takes longer than all of the tiny rows together
        model.denoiser.compile()

    def diffusers_pipeline() -> Run:
        pipe = (model if theirs in (None, dtype) else bench.model(name, theirs)).pipeline
        count = bench.size.pictures if one_a_call else batch
        side = model.latent_shape[-1] * pipe.vae_scale_factor
        settings = {"num_inference_steps": steps, "guidance_scale": 7.5 if guided else Flux.embedded_guidance}
        settings |= {"height": side, "width": side}
        return bench.clocked(lambda: published.draw(pipe, [CAT] * count, 1 if one_a_call else batch, **settings), count)

    return Sides(
        lambda: bench.clocked(lambda: sampler(steps)(model, prompts, seeds), batch),
        diffusers_pipeline,
        (first + (steps - 1) * (second - first)) / batch,
    )


Make = Callable[..., TrainedMethod]


def training(
    bench: Bench,
    make: Make,
    loop: Callable[[Bench, DiffusionModel], published.Loop],
    *,
    name: str = "SD1.4",
    batch: int = 1,
    autocast: torch.dtype | None = None,
    iterations: int | None = None,
    images: int = 0,
) -> Sides:
    """Training points: of our `fit`, with Lightning, and of the published loop, from the same seeds.

    Args:
        make: Our method, given `optimizer`, `trainer`, `iterations` and `batch_size`.
        loop: Theirs.
        batch: Points in one of our iterations. Those of the published loop have one, or as many images as ours.
        iterations: With them the flops are counted, so that each turn has to compute the same.
        images: Forget images, and retain images.
    """
    model, batch, turns = bench.model(name), bench.few(batch), iterations or bench.size.iterations
    side = model.decode(torch.zeros(1, *model.latent_shape, device=bench.device)).shape[-1] if images else 1
    pictures = bench.images(2 * images, side)
    task = bench.task(forget_images=pictures[:images], retain_images=pictures[images:])
    adam = partial(torch.optim.Adam, lr=1e-5)

    def fit(optimizer: Callable) -> None:
        model.autocast = autocast
        try:
            make(optimizer=optimizer, trainer=bench.trainer, iterations=turns, batch_size=batch).fit(model, task)
        finally:
            model.autocast = None

    def published_loop() -> Run:
        steps, count = loop(bench, model), bench.size.iterations

        def iterate() -> None:
            list(steps.iterate([seed_of(torch.initial_seed(), 0, k, 0) for k in range(count)]))

        return bench.clocked(iterate, count * (batch if images else 1))

    return Sides(
        lambda: bench.stepping(adam, fit, turns * batch),
        published_loop,
        flops_of(lambda: fit(adam)) / (turns * batch) if iterations else None,
    )


def esd(bench: Bench, *, reuse: bool = False, **settings: Any) -> Sides:
    """ESD-x, as published or as recommended: bf16, eight points in an iteration, many points of a trajectory."""
    own: dict[str, Any] = {"trajectory": "exact", "steps": bench.size.trajectory}
    if reuse:  # a pool of points lasts for as many iterations as there are steps; a turn is one pool
        own = {"trajectory": "reuse", "steps": 2 if bench.tiny else 10}
        settings |= {"iterations": own["steps"], "batch": 8, "autocast": torch.bfloat16}
    make = partial(ESD, student=Weights(ATTENTION), **own)
    return training(bench, make, partial(esd_loop, trained=published.weights(ATTENTION)), **settings)


def esd_loop(bench: Bench, model: DiffusionModel, kind: type[published.ESD] = published.ESD, **settings: Any):
    scale = {"lr": 1e-5, "steps": bench.size.trajectory, "guidance_scale": 3.0}
    return kind(model, CAT, **scale | settings)


def unguide(bench: Bench) -> Sides:
    settings = {"eta": 2.0, "guidance_scale": 9.0}
    student = LoRA(KEYS_VALUES, rank=1, alpha=8.0)
    make = partial(UnGuide, student=student, steps=bench.size.trajectory, repeats=1, **settings)
    trained = published.low_rank(KEYS_VALUES, rank=1)
    return training(bench, make, partial(esd_loop, trained=trained, anchor="a photo of the sky", **settings))


def spm(bench: Bench) -> Sides:
    student = LoRA(BLOCKS, rank=1, alpha=1.0, convolutions=True, init="kaiming")
    make = partial(SPM, student=student, steps=bench.size.trajectory)
    return training(bench, make, partial(esd_loop, kind=published.SPM, trained=published.low_rank(BLOCKS, rank=1)))


def scrubber(bench: Bench) -> Sides:
    """The second phase: training; the first, the search for prototypes, is not in the seconds."""
    N = bench.few(8)
    search = PrototypeSearch(K=2, tau=0.0, draws=1, vectors=64, purity=0.0)
    make = partial(Scrubber, student=Weights(ATTENTION), prototypes=search, conditioning="generic")

    def loop(bench: Bench, model: DiffusionModel) -> published.Scrubber:
        forget, retain = torch.randn(2, N, *model.latent_shape, device=bench.device)
        M = (forget[:, :1] > 0).float()
        return published.Scrubber(model, forget, retain, M, trained=published.weights(ATTENTION), lr=1e-5)

    return training(bench, make, loop, batch=8, images=N)


def uce(bench: Bench, *, concepts: int, name: str = "SD1.4", dtype: torch.dtype = torch.float32) -> Sides:
    model, words = bench.model(name, dtype), bench.words[: bench.few(concepts)]
    task = UnlearningTask(tuple(Concept(word, anchor="sky") for word in words))
    return Sides(
        lambda: bench.clocked(lambda: UCE().fit(model, task)),
        lambda: bench.clocked(lambda: published.uce(model, words, ["sky"] * len(words), [""])),
    )


def rece(bench: Bench, *, concepts: int) -> Sides:
    model, words = bench.model("SD1.4"), bench.words[: bench.few(concepts)]
    task = UnlearningTask(tuple(Concept(word, anchor="sky") for word in words))
    return Sides(
        lambda: bench.clocked(lambda: RECE().fit(model, task)),
        lambda: bench.clocked(lambda: published.rece(model, words, ["sky"] * len(words), [""])),
    )


def speed(bench: Bench) -> Sides:
    """SPEED's edit of many concepts: of as many by UCE as published."""
    model, words = bench.model("SD1.4"), bench.words
    erase, retain = ([Concept(w, anchor="sky") for w in part] for part in (words, (f"{w} s" for w in words)))
    task = UnlearningTask(tuple(erase), tuple(retain))
    return Sides(
        lambda: bench.clocked(lambda: SPEED().fit(model, task)),
        lambda: bench.clocked(lambda: published.uce(model, words, ["sky"] * len(words), [""])),
    )


def unlearndiffatk(bench: Bench) -> Sides:
    """Iterations of UnlearnDiffAtk: eight images at once, or one; images are not drawn in them."""
    model, N, iterations = bench.model("SD1.4"), bench.few(8), bench.size.iterations
    z_0, unused = torch.randn(N, *model.latent_shape, device=bench.device), Sampler(steps=1, batch_size=N)

    def find(optimizer: Callable, count: int) -> None:
        attack = UnlearnDiffAtk(
            images=unused, witness=Blind(), optimizer=optimizer, times=1, iterations=iterations, batch_size=count
        )
        rows = [ManifestRow(bench.folder, CAT, ERASE, {}, i) for i in range(count)]
        attack.find(model, bench.task(), rows, z_0[:count])

    def side(count: int) -> Run:
        make = partial(torch.optim.Adam, lr=0.01)
        return bench.stepping(make, lambda optimizer: find(optimizer, count), iterations * count)

    return Sides(lambda: side(N), lambda: side(1))


class Blind:
    """A witness that never sees the concept."""

    name, threshold = "blind", 0.5

    def __call__(self, images: Tensor, rows: Sequence[ManifestRow]) -> list[float]:
        return [0.0] * len(rows)


def cce(bench: Bench, *, batch: int, accumulate: int, one_by_one: bool = False) -> Sides:
    """Steps of textual inversion with `batch` images, `accumulate` times; theirs perhaps with an image in a call."""
    model, N, iterations = bench.model("SD1.4"), bench.few(8), bench.size.iterations
    batch, accumulate = bench.few(batch), bench.few(accumulate)
    z_0 = torch.randn(N, *model.latent_shape, device=bench.device)
    make, unused = partial(torch.optim.AdamW, lr=5e-3), Generated(str(bench.folder), Sampler())

    def find(optimizer: Callable) -> None:
        attack = CCE(
            images=unused, optimizer=optimizer, iterations=iterations, batch_size=batch, accumulate=accumulate,
            initial="cat",
        )  # fmt: skip
        attack.find(model, bench.task(), [ManifestRow(bench.folder, CAT, ERASE, {}, 0)], Observed({"cat": z_0}, {}))

    theirs = (
        {"batch": 1, "accumulate": batch * accumulate} if one_by_one else {"batch": batch, "accumulate": accumulate}
    )
    inversion = partial(published.textual_inversion, model, z_0, "a photo of a x", lr=5e-3, iterations=iterations)
    return Sides(
        lambda: bench.stepping(make, find, iterations),
        lambda: bench.clocked(lambda: inversion(**theirs), iterations),
    )


def codes(bench: Bench) -> Sides:
    model, count = bench.vqgan(), bench.size.images
    images = bench.images(count, model.size)
    task = bench.task(forget_images=images[: count // 2], retain_images=images[count // 2 :])
    some = images[: max(1, count // 8)]  # enough of the other side, which takes one after the other
    return Sides(
        lambda: bench.clocked(lambda: count_codes(model, task, bench.trainer, batch_size=64), count),
        lambda: bench.clocked(lambda: published.count_codes(model, some), len(some)),
    )


def features(bench: Bench) -> Sides:
    """Inception features of PNGs of 512 pixels, read from disk; clean-fid's own way has worker processes."""
    folder, count = bench.folder / "png", bench.size.pngs
    folder.mkdir(exist_ok=True)
    for i, image in enumerate(bench.images(count, 32 if bench.tiny else 512)):
        Image.fromarray(image).save(folder / f"{i}.png")
    network = inception_v3(weights=None, aux_logits=False, init_weights=False) if not bench.tiny else None
    torch.jit.script(_Layers(network).eval()).save(str(bench.folder / "inception-2015-12-05.pt"))
    inception = Inception(bench.folder)
    inception.network.to(bench.device)

    @torch.no_grad()
    def theirs() -> None:
        clean = {"mode": "clean", "device": torch.device(bench.device), "num_workers": bench.size.workers}
        get_folder_features(str(folder), inception.network, batch_size=64, verbose=False, **clean)

    def ours() -> None:
        for batch in of_folder(folder).batches():
            inception(torch.as_tensor(batch, device=bench.device))

    return Sides(lambda: bench.clocked(ours, count), lambda: bench.clocked(theirs, count))


class _Layers(nn.Module):
    """Random weights in the form of clean-fid's file: its `layers` map (B, 3, 299, 299) to 2048 features."""

    def __init__(self, network: nn.Module | None):
        super().__init__()
        tiny = (nn.Conv2d(3, 8, 16, stride=16), nn.AdaptiveAvgPool2d(16), nn.Flatten())
        kept = tiny if network is None else (*list(network.children())[:-2], nn.Flatten())  # not dropout and classes
        self.layers = nn.Sequential(*kept)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


HALF, FULL = torch.bfloat16, torch.float32
LARGE = ("SDXL", "SD3-medium", "FLUX.1-dev")
FASTER, SMALLER = "≥ 1.0 ×", "memory ≤ 0.7"
one_a_call = partial(generation, batch=32, one_a_call=True, theirs=FULL)
one_edit = partial(uce, concepts=1)


def same_batch(label: str, seconds: float = 15, **settings: Any) -> Row:
    return Row(f"generation, {label}: diffusers, same batch", "image", seconds, partial(generation, **settings), FASTER)


def points(label: str, seconds: float, sides: Callable[[Bench], Sides], goal: str = SMALLER) -> Row:
    return Row(f"{label}: published loop", "training point", seconds, sides, goal)


ROWS = (  # the most important first
    Row("generation, bf16, batch 32: diffusers, fp32, one a call", "image", 30, one_a_call, "≥ 10 ×"),
    same_batch("bf16, batch 8", batch=8),
    points("ESD-x, fp32", 40, esd),
    points("ESD-x, bf16, batch 8, points reused", 50, partial(esd, reuse=True), "≥ 8 ×"),
    Row("UCE, 1 concept: published", "edit", 8, one_edit, "≤ 1 s"),
    Row("UCE, 100 concepts: published", "edit", 12, partial(uce, concepts=100), "≤ 5 s"),
    Row("CCE, 4 × 4 images: published", "step", 25, partial(cce, batch=4, accumulate=4)),
    Row("RECE, 1 concept: published", "edit", 8, partial(rece, concepts=1), "≤ 1 s"),
    Row("RECE, 100 concepts: published", "edit", 30, partial(rece, concepts=100), "≤ 5 s"),
    Row("SPEED, 100 concepts, as many retained: UCE as published", "edit", 15, speed, "≤ 5 s"),
    Row("UnlearnDiffAtk, 8 images at once: one by one", "image and step", 20, unlearndiffatk, "≥ 4 ×"),
    points("UnGuide, fp32", 35, unguide),
    points("scrubber, fp32, batch 8", 35, scrubber),
    points("SPM, fp32", 40, spm),
    same_batch("bf16, batch 1", batch=1),
    Row("LCR, counting codes: one a call", "image", 10, codes),
    Row("FID, Inception features: clean-fid", "image", 15, features),
    same_batch("bf16, batch 32", 25, batch=32),
    same_batch("fp32, batch 8", 30, batch=8, dtype=FULL),
    *(same_batch(f"{name}, bf16, batch 1", 30, name=name, batch=1) for name in LARGE),
    *(
        Row(f"UCE, {name}, bf16, 1 concept: published", "edit", 15, partial(one_edit, name=name, dtype=HALF), "≤ 1 s")
        for name in LARGE
    ),
    Row(
        "generation, bf16, batch 32, compiled: diffusers, fp32, one a call", "image", 90,
        partial(one_a_call, compiled=True), "≥ 10 ×",
    ),
    Row("CCE, 16 images in a call: one by one", "step", 40, partial(cce, batch=16, accumulate=1, one_by_one=True)),
    *(points(f"ESD-x, {name}, fp32", 60, partial(esd, name=name)) for name in LARGE[:2]),
)  # fmt: skip


def measured(row: Row, bench: Bench) -> dict[str, Any]:
    """The row's numbers: seconds for each unit, their ratio, peak memory in bytes."""
    start = time.perf_counter()
    torch.manual_seed(0)
    sides = row.sides(bench)
    before = bench.allocated()
    ours = sides.ours()
    peak_ours = bench.with_peak(ours, 0)
    held = bench.allocated() - before
    theirs = sides.theirs()
    peak_theirs = bench.with_peak(theirs, held)
    ours_s: list[float] = []
    theirs_s: list[float] = []
    while len(ours_s) < bench.size.turns and (len(ours_s) < 2 or time.perf_counter() < start + row.seconds):
        for run, seconds in ((ours, ours_s), (theirs, theirs_s)):
            torch.manual_seed(len(seconds))
            seconds.append(run())
    ratios = [b / a for a, b in zip(ours_s, theirs_s, strict=True)]
    mean = statistics.mean(ours_s)
    return {
        "unit": row.unit, "goal": row.goal, "n": len(ratios),
        "ours_s": mean, "published_s": statistics.mean(theirs_s),
        "ratio": statistics.mean(ratios), "ratio_se": statistics.stdev(ratios) / len(ratios) ** 0.5,
        "ours_bytes": peak_ours, "published_bytes": peak_theirs,
        "utilisation": sides.flops / mean / bench.peak_flops if sides.flops else None,
        "took_s": time.perf_counter() - start,
    }  # fmt: skip


COLUMNS = (
    "what", "unit", "ours (s)", "published (s)", "× faster", "± SE", "N", "goal", "ours (GiB)", "published (GiB)",
    "ours / published", "FLOPs (%)",
)  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """Markdown."""

    def line(name: str, row: dict[str, Any]) -> str:
        if "error" in row:
            return f"| {name} | failed: {row['error']} |"
        memory = [row["ours_bytes"] / 2**30, row["published_bytes"] / 2**30]
        numbers = [row["ours_s"], row["published_s"], row["ratio"], row["ratio_se"]]
        share = f"{100 * row['utilisation']:.3g}" if row["utilisation"] else ""
        cells = [name, row["unit"], *(f"{x:.3g}" for x in numbers), row["n"], row["goal"]]
        cells += [*(f"{x:.3g}" for x in memory), f"{memory[0] / memory[1]:.2f}", share]
        return f"| {' | '.join(map(str, cells))} |"

    machine = results["machine"]
    head = f"{machine['card']}; torch {machine['torch']}, diffusers {machine['diffusers']}"
    peak = f"{machine['peak_flops'] / 1e12:.3g} T operations a second in a bf16 matrix product"
    lines = [line(row.name, results["rows"][row.name]) for row in ROWS if row.name in results["rows"]]
    return "\n".join([f"{head}; {peak}.", "", f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}", *lines, ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures the rows that are missing; returns how many failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--only", default="", help="rows whose names have this text")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny models: whether it runs, not how fast")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    bench = Bench(options.device, options.tiny)
    card = torch.cuda.get_device_name() if options.device == "cuda" else str(hardware()["cpu"])
    file = options.out / f"{'tiny-' * options.tiny}{re.sub(r'[^a-zA-Z0-9]+', '-', card).strip('-')}.json"
    results = json.loads(file.read_text()) if file.exists() else {"rows": {}}
    results["machine"] = {"card": card, "torch": torch.__version__, "diffusers": diffusers.__version__,
                          "peak_flops": bench.peak_flops}  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    left: list[str] = []
    for row in (row for row in ROWS if options.only in row.name):
        if "error" not in results["rows"].get(row.name, {"error": "missing"}):
            continue
        if time.perf_counter() - start + row.seconds > 60 * options.minutes:
            left.append(row.name)
            continue
        try:
            results["rows"][row.name] = measured(row, bench)
        except Exception as error:  # the other rows are measured nevertheless
            traceback.print_exc()
            results["rows"][row.name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        bench.release()
        write_atomically(file, json.dumps(results, indent=1) + "\n")
        write_atomically(file.with_suffix(".md"), table(results))
        print(f"{time.perf_counter() - start:5.0f} s  {row.name}", flush=True)
    print(f"\n{table(results)}\n{file}")
    if left:
        print(f"{len(left)} rows were left out for want of time; the same command goes on with them: {', '.join(left)}")
    return sum("error" in row for row in results["rows"].values())


def quieten() -> None:
    for name in ("pytorch_lightning", "lightning_fabric", "transformers", "unlearning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")

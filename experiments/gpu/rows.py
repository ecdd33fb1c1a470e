"""The rows of the GPU table. A new row is a function that returns the two sides, and a line in ROWS."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from cleanfid.fid import get_folder_features
from PIL import Image
from torch import Tensor, nn
from torchvision.models import inception_v3

from experiments.gpu.bench import CAT, Bench, Row, Run, Sides, flops_of
from experiments.speed import published
from unlearning.attacks.cce import CCE
from unlearning.attacks.unlearndiffatk import UnlearnDiffAtk
from unlearning.codes.frequency import count_codes
from unlearning.concepts import ERASE, Concept, UnlearningTask
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
from unlearning.sampling.sampler import Sampler
from unlearning.scrubbing.prototypes import PrototypeSearch
from unlearning.store.manifest import ManifestRow
from unlearning.training.batches import seed_of
from unlearning.training.student import LoRA, Weights

ATTENTION = r"attn2|\.add_"  # the weights that ESD-x trains
KEYS_VALUES = r"attn2\.to_(k|v)$|add_(k|v)_proj$"  # UnGuide's layers
BLOCKS = r"attentions\.\d+\."  # SPM's: beside every linear map and convolution in them


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
    make = partial(Scrubber, student=Weights(ATTENTION), prototypes=search, conditioning="null")

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
        attack.find(model, bench.task(), [ManifestRow(bench.folder, CAT, ERASE, {}, 0)], {"cat": z_0})

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
    *(same_batch(f"bf16, batch {n}, compiled", 60, batch=n, compiled=True) for n in (1, 8)),
    *(same_batch(f"fp32, batch {n}", 30, batch=n, dtype=FULL) for n in (1, 32)),
)  # fmt: skip

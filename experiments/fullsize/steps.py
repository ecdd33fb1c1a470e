"""What is run: every method and attack of conf/ for one step, and the published loops of those that have one here."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import torch
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf

from experiments.fullsize.memory import Counted, counted
from experiments.gpu.bench import CAT
from experiments.gpu.rows import ATTENTION, BLOCKS, KEYS_VALUES
from experiments.speed import published
from tests.composed import ATTACKS, config, shortened
from unlearning.__main__ import CONF
from unlearning.concepts import ERASE, UnlearningTask
from unlearning.config import instances
from unlearning.config.suggestions import choices
from unlearning.methods.base import Method
from unlearning.models.diffusion import DiffusionModel
from unlearning.sampling.attack_result import AttackResult
from unlearning.sampling.sampler import Sampler

Step = Callable[[DiffusionModel], Counted]
MOST = 2  # at the first step of an optimizer its states are not there yet
NOTHING = ("none", "oracle", "weights")  # they compute nothing, or load what is not here
ENDLESS = ("words_solve",)  # it tries words in thousands of calls of the denoiser, whatever its numbers


@cache
def methods(family: type[DiffusionModel]) -> list[str]:
    """The names of the methods that work on a family."""
    named = [name for name in choices(CONF, "method") if name not in NOTHING + ENDLESS]
    return [name for name in named if issubclass(family, target(name).works_on)]


def target(name: str) -> type[Method]:
    """The class of a method; a variant's is that of the method on which its file builds."""
    file = OmegaConf.load(CONF / "method" / f"{name}.yaml")
    return get_class(file["_target_"]) if "_target_" in file else target(file["defaults"][0].partition("@")[0])


def method(name: str, model: DiffusionModel) -> Counted:
    """A fit with MOST in the place of every larger whole number of its file: iterations, steps, batch size, ..."""
    flow = (
        ["sampler.scheduler.path=diffusers.FlowMatchEulerDiscreteScheduler"] if model.prediction_type == "flow" else []
    )
    cfg = _config(f"method={name}", *flow)
    task, settings = enlarged(instantiate(cfg.dataset), model), OmegaConf.to_container(cfg.method)
    made = instantiate(cfg.method, **instances.trainers(settings, instantiate(cfg.trainer)))
    return counted([*model.parts.values()], lambda: lambda: made.fit(model, task))


def attack(name: str, model: DiffusionModel) -> Counted:
    """The search of an attack on one image, shortened as a fit is."""
    cfg = _config("method=none", f"attack=[{name}]")
    task, made = enlarged(instantiate(cfg.dataset), model), instantiate(cfg.attack[name])
    rows = [row for row in instantiate(cfg.sampler).manifest(Path(mkdtemp()), task, 0) if row.role == ERASE][:1]

    def search() -> AttackResult:
        observed = made.observe(model, task, rows)
        return observed if isinstance(observed, AttackResult) else made.find(model, task, rows, observed)

    return counted([*model.parts.values()], lambda: search)


def image(model: DiffusionModel) -> Counted:
    """One image in one step, with guidance."""
    return counted([*model.parts.values()], lambda: lambda: Sampler(steps=1)(model, [CAT], [0]))


def esd_loop(model: DiffusionModel, kind: type[published.ESD] = published.ESD, **settings) -> Counted:
    return _loop(model, lambda: kind(model, CAT, lr=1e-5, steps=MOST, guidance_scale=3.0, **settings))


def scrubber_loop(model: DiffusionModel) -> Counted:
    def make() -> published.Scrubber:
        forget, retain = torch.randn(2, MOST, *model.latent_shape)
        trained = published.weights(ATTENTION)
        return published.Scrubber(model, forget, retain, (forget[:, :1] > 0).float(), trained=trained, lr=1e-5)

    return _loop(model, make)


def inversion(model: DiffusionModel) -> Counted:
    z_0 = torch.randn(1, *model.latent_shape)
    once = {"lr": 5e-3, **dict.fromkeys(("iterations", "batch", "accumulate"), MOST)}
    return counted(
        [*model.parts.values()], lambda: lambda: published.textual_inversion(model, z_0, "a photo of a x", **once)
    )


def closed_form(solve: Callable, model: DiffusionModel) -> Counted:
    return counted([*model.parts.values()], lambda: lambda: solve(model, ["cat"], ["sky"], [""]))


PUBLISHED: dict[str, Step] = {
    "method/esd_x": partial(esd_loop, trained=published.weights(ATTENTION)),
    "method/esd_u": partial(esd_loop, trained=published.weights(r"^(?!.*attn2)")),
    "method/unguide": partial(esd_loop, trained=published.low_rank(KEYS_VALUES, rank=1), anchor="the sky"),
    "method/spm": partial(esd_loop, kind=published.SPM, trained=published.low_rank(BLOCKS, rank=1), anchor_count=MOST),
    "method/scrubber": scrubber_loop,
    "method/uce": partial(closed_form, published.uce),
    "method/rece": partial(closed_form, partial(published.rece, repetitions=MOST)),
    "attack/cce": inversion,
}


def steps(family: type[DiffusionModel]) -> dict[str, Step]:
    """Every step by its name; "published/NAME" is the published loop of a method or an attack."""
    named = {f"method/{name}": partial(method, name) for name in methods(family)}
    named |= {f"attack/{name}": partial(attack, name) for name in ATTACKS}
    return {"image": image, **named, **{f"published/{name}": loop for name, loop in PUBLISHED.items()}}


def enlarged(task: UnlearningTask, model: DiffusionModel) -> UnlearningTask:
    """The task with a few images only, as large as those that the model draws."""
    side = model.latent_shape[-1] * model.pipeline.vae_scale_factor

    def large(images) -> list[np.ndarray]:
        return [np.kron(image, np.ones((side // len(image), side // len(image), 1), np.uint8)) for image in images]

    return replace(task, forget_images=large(task.forget_images[:MOST]), retain_images=large(task.retain_images[:MOST]))


def _loop(model: DiffusionModel, make: Callable[[], published.Loop]) -> Counted:
    def build() -> Callable[[], object]:
        loop = make()
        return lambda: list(loop.iterate(range(MOST)))

    return counted([*model.parts.values()], build)


def _config(*chosen: str) -> DictConfig:
    cfg = config(Path(mkdtemp(prefix="fullsize-")), "concept=cat", "~specialization", f"sampler.steps={MOST}", *chosen)
    for group in ("method", "attack"):
        shortened(cfg[group], MOST)
    return cfg

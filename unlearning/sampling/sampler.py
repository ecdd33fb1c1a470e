"""The one denoising loop. Methods, attacks and evaluations all draw their pictures and their latents here."""

# B batch, C H W latent shape.
from collections.abc import Iterator, Sequence
from typing import Literal, get_args

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from unlearning.errors import UserError
from unlearning.models.diffusion import Conditioning, DiffusionModel
from unlearning.sampling.guidance import Guidance
from unlearning.store.images import Row, manifest

Schedule = Literal["diffusers", "paper"]


@torch.no_grad()
def denoise(
    model: DiffusionModel,
    x: Tensor,
    c: Conditioning,
    *,
    steps: int,
    guidance_scale: float | Tensor,
    scheduler: type[SchedulerMixin] | None = None,
    schedule: Schedule = "diffusers",
    guidance: Guidance | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (t, x_t) before every step, and (0, x_0) after the last; x is standard normal noise (B, C, H, W).

    Args:
        guidance_scale: A number, or one for each row: (B, 1, 1, 1).
        scheduler: In place of the model's own solver.
        schedule: "diffusers" takes every timestep; "paper" leaves out the first, as the samplers in ESD's and UnGuide's
            repositories do: of 50 DDIM steps 49 are taken, from 961 on, and not from 981.
        guidance: In place of the model's own.

    Raises:
        UserError: For an unknown schedule, or the published one where it is not defined.
    """
    noise = _timesteps(model, scheduler or model.solver, steps, schedule)
    null = model.encode_prompts([""]).expand(len(x))
    rule = guidance or model.guidance.for_prompts(model, c, guidance_scale)
    flow = model.prediction_type == "flow"  # of which schedulers take noise and latents as they are
    x = x if flow else x * noise.init_noise_sigma
    for t in noise.timesteps[schedule == "paper" :]:
        yield t, x
        prediction = rule(model, x if flow else noise.scale_model_input(x, t), t, c, null, guidance_scale)
        x = noise.step(prediction, t, x).prev_sample
    yield torch.zeros_like(t), x


@torch.no_grad()
def skim(
    model: DiffusionModel,
    x: Tensor,
    c: Conditioning,
    *,
    steps: int,
    guidance_scale: float,
    schedule: Schedule = "diffusers",
    every: int = 5,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields what `denoise` yields, of a trajectory that asks for a prediction at every so many timesteps only.

    In between, the picture and the noise that the last prediction implies are held: x_s = alpha_s x_0 + sigma_s eps, as
    in DDIM's own step (Song et al., 2021, eq. 12). Coarser, and so many times cheaper.
    """
    null, held = model.encode_prompts([""]).expand(len(x)), None
    for i, t in enumerate(_timesteps(model, model.solver, steps, schedule).timesteps[schedule == "paper" :]):
        s = t.expand(len(x))
        x = model.add_noise(*held, s) if held else x
        yield t, x
        if i % every == 0:
            prediction = model.guidance(model, x, t, c, null, guidance_scale)
            held = model.to_x0(prediction, x, s), model.to_eps(prediction, x, s)
    yield torch.zeros_like(t), held[0]


def _timesteps(
    model: DiffusionModel, scheduler: type[SchedulerMixin], steps: int, schedule: Schedule
) -> SchedulerMixin:
    """A scheduler with its timesteps set. Raises UserError as `denoise` says."""
    _check(schedule)
    if schedule == "paper" and model.prediction_type == "flow":
        raise UserError("schedule=paper is that of DDIM; a model of flow matching has only schedule=diffusers.")
    noise = scheduler.from_config(model.scheduler.config)
    # DDIM's default is for pictures, and the config of a model made for another solver may be silent about it.
    noise.register_to_config(clip_sample=model.scheduler.config.get("clip_sample", False))
    model.set_timesteps(noise, steps)
    return noise


def _check(schedule: str) -> None:
    if schedule not in (known := get_args(Schedule)):
        raise UserError(f"There is no schedule {schedule!r}; there are {', '.join(known)}.")


def as_published(i: int, steps: int, length: int = 1000) -> tuple[int, range]:
    """What those samplers do when told to stop at `i`: the steps they take, and the timesteps then asked about.

    The latent stands one and a half to two and a half steps below them: at 761, for i = 40 of 50 and 800 to 819.
    """
    return min(steps - i, steps - 1), range(round(i * length / steps), round((i + 1) * length / steps))


def per_row(values: Tensor) -> Tensor:
    """(B,) to (B, 1, 1, 1)."""
    return values.reshape(-1, 1, 1, 1)


class Sampler:
    """Draws pictures.

    Args:
        steps, guidance_scale: The field's protocol is 50 and 7.5.
        scheduler: A diffusers scheduler class, for the model's own noise schedule; by default the model's solver.
        schedule: Which of its timesteps are taken (see `denoise`).
        batch_size: How many pictures at once; it changes no picture.

    Raises:
        UserError: For an unknown schedule.
    """

    def __init__(
        self,
        steps: int = 50,
        guidance_scale: float = 7.5,
        scheduler: type[SchedulerMixin] | None = None,
        schedule: Schedule = "diffusers",
        batch_size: int = 16,
    ):
        _check(schedule)  # a sampler is first used when the fit is over
        self.steps, self.guidance_scale, self.schedule = steps, guidance_scale, schedule
        self.scheduler, self.batch_size = scheduler, batch_size

    @property
    def protocol(self) -> str:
        """What its pictures depend on, besides model, prompt and seed."""
        dropped = ", the first dropped" if self.schedule == "paper" else ""
        solver = self.scheduler.__name__ if self.scheduler else "the model's solver"
        return f"{solver}, {self.steps} steps{dropped}, guidance {self.guidance_scale}"

    def __call__(self, model: DiffusionModel, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Pictures (B, 3, height, width) in [0, 1], one for each prompt and seed."""
        return self.sample(model, prompts, seeds, [None] * len(prompts))[0]

    manifest = staticmethod(manifest)

    def draw(self, model: DiffusionModel, rows: Sequence[Row]) -> tuple[Tensor, list[dict[str, float]]]:
        """The pictures of a manifest's rows, and what was decided about each."""
        asked = zip(*((row.prompt, row.seed, row.guidance_scale) for row in rows), strict=True)
        return self.sample(model, *asked)

    def sample(
        self, model: DiffusionModel, prompts: Sequence[str], seeds: Sequence[int], scales: Sequence[float | None]
    ) -> tuple[Tensor, list[dict[str, float]]]:
        """The pictures, and what the model's guidance decided about each; None stands for the sampler's own scale."""
        c = model.encode_prompts(prompts)
        own = [self.guidance_scale if scale is None else scale for scale in scales]
        scale = own[0] if len(set(own)) == 1 else per_row(torch.tensor(own, device=model.device))
        rule = model.guidance.for_prompts(model, c, scale)
        settings = {"steps": self.steps, "scheduler": self.scheduler, "schedule": self.schedule}
        path = denoise(model, model.noise(seeds), c, guidance_scale=scale, guidance=rule, **settings)
        for _, x in path:  # noqa: B007 (the last x is the picture)
            pass
        decisions = [{k: v[i] for k, v in rule.decisions.items()} for i in range(len(prompts))]
        return model.decode(x), decisions

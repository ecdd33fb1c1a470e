"""The one denoising loop. Methods, attacks and evaluations all take their images and latents from here."""

# B batch, C H W latent shape.
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, Self, get_args

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from unlearning.config.values import Count, Finite, Steps
from unlearning.errors import UserError
from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.guidance import Walk
from unlearning.sampling.attack_result import Restored, Tensors, restored
from unlearning.sampling.guidance import begin, check_scale
from unlearning.store.manifest import ManifestRow, manifest

MOST, USUAL = 64, 16  # images in a batch: more are no faster
Schedule = Literal["diffusers", "paper"]
Step = Callable[[SchedulerMixin, Tensor, Tensor, Tensor], Tensor]  # (scheduler, prediction, t, x_t) -> the next x


@torch.no_grad()
def denoise(
    model: DiffusionModel,
    x: Tensor,
    walk: Walk,
    *,
    steps: int,
    scheduler: type[SchedulerMixin] | None = None,
    schedule: Schedule = "diffusers",
    start: int = 0,
    step: Step | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (t, x_t) before every step, and (0, x_0) after the last.

    Args:
        x: Standard normal noise (B, C, H, W); with `start`, the latents x_t at the timestep of that step.
        walk: Gives the prediction at each step (guidance.py).
        scheduler: In place of the model's own solver.
        schedule: "diffusers" takes every timestep; "paper" leaves out the first, as the samplers in ESD's and UnGuide's
            repositories do: of 50 DDIM steps 49 are taken, from 961 on, and not from 981.
        start: Number of steps to skip at the beginning.
        step: Computes a step; by default the scheduler's `step`.

    Raises:
        UserError: For an unknown schedule, "paper" for a model of flow matching, or a scheduler for another kind of
            noise schedule than the model's.
    """
    noise = timesteps_of(model, scheduler or model.solver, steps, schedule)
    flow = model.prediction_type == "flow"  # its schedulers take unscaled noise and latents
    times = noise.timesteps[schedule == "paper" :][start:]
    if start:
        noise.set_begin_index(len(noise.timesteps) - len(times)) if hasattr(noise, "set_begin_index") else None
        walk.skip(start)
        x = x if flow else x / noise.scale_model_input(torch.ones_like(x), times[0])
    else:
        x = x if flow else x * noise.init_noise_sigma
    for t in times:
        yield t, x
        prediction = walk(x if flow else noise.scale_model_input(x, t), t)
        x = step(noise, prediction, t, x) if step else noise.step(prediction, t, x).prev_sample
    yield torch.zeros_like(t), x


@torch.no_grad()
def skim(
    model: DiffusionModel, x: Tensor, walk: Walk, *, steps: int, schedule: Schedule = "diffusers", every: int = 5
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields what `denoise` yields, but evaluates the denoiser at every `every`-th timestep only.

    In between, the x_0 and eps that the last prediction implies are kept: x_s = alpha_s x_0 + sigma_s eps, as in DDIM's
    step (Song et al., 2021, eq. 12). The trajectory is coarser, and `every` times cheaper.
    """
    held: tuple[Tensor, Tensor] | None = None  # the image and the noise
    for i, t in enumerate(timesteps_of(model, model.solver, steps, schedule).timesteps[schedule == "paper" :]):
        s = t.expand(len(x))
        x = model.add_noise(*held, s) if held else x
        yield t, x
        if i % every:
            walk.skip()
        else:
            prediction = walk(x, t)
            held = model.to_x0(prediction, x, s), model.to_eps(prediction, x, s)
    yield torch.zeros_like(t), held[0] if held else x


def timesteps_of(
    model: DiffusionModel, scheduler: type[SchedulerMixin], steps: int, schedule: Schedule = "diffusers"
) -> SchedulerMixin:
    """A scheduler with its timesteps set. Raises UserError as `denoise` does."""
    _check(schedule)
    if schedule == "paper" and model.prediction_type == "flow":
        raise UserError("schedule=paper is defined for DDIM only; a model of flow matching takes schedule=diffusers.")
    noise, own = scheduler.from_config(model.scheduler.config), model.scheduler
    diffusion, of_diffusion = (hasattr(one, "alphas_cumprod") for one in (noise, own))
    fits = of_diffusion if diffusion else model.prediction_type == "flow"
    if not (fits or isinstance(noise, type(own))):  # it would use defaults for settings that the model's config lacks
        raise UserError(
            f"{scheduler.__name__} does not know the noise schedule of {model.name}, which is of a "
            f"{type(own).__name__}: sampler.scheduler.path=diffusers.{type(own).__name__}."
        )
    # DDIM's default is to clip x_0, which is meant for pixels. The config of a model for another solver may not set it.
    noise.register_to_config(clip_sample=model.scheduler.config.get("clip_sample", False))
    model.set_timesteps(noise, steps)
    if diffusion and (first := noise.timesteps.max()) >= (end := len(noise.alphas_cumprod)):
        raise UserError(
            f"{steps} steps are too many for {scheduler.__name__}: they would begin at timestep {first:.0f}, and the "
            f"model's last is {end - 1}. Take fewer steps."
        )
    return noise


def _check(schedule: str) -> None:
    if schedule not in (known := get_args(Schedule)):
        raise UserError(f"There is no schedule {schedule!r}. Schedules: {', '.join(known)}.")


def as_published(i: int, steps: int, length: int = 1000) -> tuple[int, range]:
    """How the published samplers stop at `i`: the number of steps, and the range from which t is then drawn.

    The latent lies one and a half to two and a half steps below that range: at 761 for i = 40 of 50 and t from 800 to
    819.
    """
    return min(steps - i, steps - 1), range(round(i * length / steps), round((i + 1) * length / steps))


def per_row(values: Tensor) -> Tensor:
    """(B,) to (B, 1, 1, 1)."""
    return values.reshape(-1, 1, 1, 1)


class Sampler:
    """Generates images.

    Args:
        steps, guidance_scale: The field's protocol is 50 and 7.5.
        scheduler: A diffusers scheduler class, for the model's own noise schedule; by default the model's solver.
        schedule: Which of its timesteps are taken (see `denoise`).
        batch_size: Images in one batch. It changes no image. "auto" is as many as an accelerator's memory holds, up to
            MOST, and USUAL on a CPU.

    Raises:
        UserError: For an unknown schedule.
    """

    def __init__(
        self,
        steps: Steps = 50,
        guidance_scale: Finite = 7.5,
        scheduler: type[SchedulerMixin] | None = None,
        schedule: Schedule = "diffusers",
        batch_size: Count | Literal["auto"] = 16,
    ):
        _check(schedule)  # here, because a sampler is first used after the fit
        self.steps, self.guidance_scale, self.schedule = steps, guidance_scale, schedule
        self.scheduler, self.automatic = scheduler, batch_size == "auto"  # generation.py then lowers it until it fits
        self.batch_size = (MOST if torch.cuda.is_available() else USUAL) if batch_size == "auto" else batch_size

    def batched_as(self, other: "Sampler") -> Self:
        """This sampler, with the batch size of another one, also if that is automatic."""
        self.batch_size, self.automatic = other.batch_size, other.automatic
        return self

    @property
    def protocol(self) -> str:
        """All that its images depend on, besides model, prompt and seed, as text."""
        dropped = ", the first dropped" if self.schedule == "paper" else ""
        solver = self.scheduler.__name__ if self.scheduler else "the model's solver"
        return f"{solver}, {self.steps} steps{dropped}, guidance {self.guidance_scale}"

    def __call__(self, model: DiffusionModel, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Images (B, 3, height, width) in [0, 1], one for each prompt and seed."""
        return self.sample(model, Restored(prompts, model.noise(seeds)))[0]

    manifest = staticmethod(manifest)

    def check(self, model: DiffusionModel, rows: Sequence[ManifestRow]) -> None:
        """Raises UserError if the rows cannot be drawn: with these steps, with the model's guidance, at their sizes."""
        timesteps_of(model, self.scheduler or model.solver, self.steps, self.schedule)
        for scale in {self.guidance_scale if row.guidance_scale is None else row.guidance_scale for row in rows}:
            check_scale(model.guidance, scale)
        for height, width in {(row.height, row.width) for row in rows}:
            model.at_size(height, width)

    def draw(self, model: DiffusionModel, rows: Sequence[ManifestRow]) -> tuple[Tensor, list[dict[str, float]]]:
        """The images of a manifest's rows, and what the guidance decided about each.

        Raises:
            UserError: If the rows have several sizes.
        """
        size, *others = {(row.height, row.width) for row in rows}
        if others:
            raise UserError(
                "Images of several sizes cannot be generated in one batch: dataset.sizes=false gives all the model's "
                "size."
            )
        model = model.at_size(*size)
        prompts, seeds, files = zip(*((row.prompt, row.seed, row.comeback) for row in rows), strict=True)
        return self.sample(model, restored(model, prompts, seeds, files), [row.guidance_scale for row in rows])

    def sample(
        self, model: DiffusionModel, batch: Restored, scales: Sequence[float | None] = ()
    ) -> tuple[Tensor, list[dict[str, float]]]:
        """The images of a batch, and what the model's guidance decided about each.

        Args:
            scales: A guidance scale for each image; None is the sampler's own.
        """
        c = batch.encoded(model)
        walk = self.begin(model, c, scales)
        for _, x in self.trajectory(model, batch.noise, walk, batch.given):  # noqa: B007 (the last x is the image)
            pass
        decisions = [{k: v[i] for k, v in walk.decisions.items()} for i in range(len(c))]
        return model.decode(x), decisions

    def begin(self, model: DiffusionModel, c: Conditioning, scales: Sequence[float | None] = ()) -> Walk:
        """A walk of the model's guidance, with a guidance scale for each image; None is the sampler's own."""
        own = [self.guidance_scale if scale is None else scale for scale in scales or [None] * len(c)]
        return begin(model, c, own[0] if len(set(own)) == 1 else per_row(torch.tensor(own, device=model.device)))

    def trajectory(
        self, model: DiffusionModel, x: Tensor, walk: Walk, given: Sequence[Tensors]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The trajectory from x (B, C, H, W) to an image. Attacks override it; `given` has the tensors of each row."""
        return denoise(model, x, walk, steps=self.steps, scheduler=self.scheduler, schedule=self.schedule)

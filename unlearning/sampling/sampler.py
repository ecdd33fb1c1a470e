"""The one denoising loop. Methods, attacks and evaluations all draw their pictures and their latents here."""

# B batch, C H W latent shape.
from collections.abc import Iterator, Sequence

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from torch import Tensor

from unlearning.models.base import Conditioning, DiffusionModel


@torch.no_grad()
def denoise(
    model: DiffusionModel,
    x: Tensor,
    c: Conditioning,
    *,
    steps: int,
    guidance_scale: float,
    scheduler: type[SchedulerMixin] = DDIMScheduler,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (t, x_t) before every step, and (0, x_0) after the last; x is standard normal noise (B, C, H, W)."""
    schedule = scheduler.from_config(model.scheduler.config)
    schedule.set_timesteps(steps, device=model.device)
    null = model.encode_prompts([""]).expand(len(x))
    x = x * schedule.init_noise_sigma
    for t in schedule.timesteps:
        yield t, x
        prediction = model.guidance(model, schedule.scale_model_input(x, t), t, c, null, guidance_scale)
        x = schedule.step(prediction, t, x).prev_sample
    yield torch.zeros_like(t), x


class Sampler:
    """Draws pictures.

    Args:
        steps, guidance_scale: The field's protocol is 50 and 7.5.
        scheduler: A diffusers scheduler class; it takes the model's own noise schedule.
        batch_size: How many pictures at once; it changes no picture.
    """

    def __init__(
        self,
        steps: int = 50,
        guidance_scale: float = 7.5,
        scheduler: type[SchedulerMixin] = DDIMScheduler,
        batch_size: int = 16,
    ):
        self.steps, self.guidance_scale, self.scheduler, self.batch_size = steps, guidance_scale, scheduler, batch_size

    @property
    def protocol(self) -> str:
        """What its pictures depend on, besides model, prompt and seed."""
        return f"{self.scheduler.__name__}, {self.steps} steps, guidance {self.guidance_scale}"

    def __call__(self, model: DiffusionModel, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        """Pictures (B, 3, height, width) in [0, 1], one for each prompt and seed."""
        c = model.encode_prompts(prompts)
        settings = {"steps": self.steps, "guidance_scale": self.guidance_scale, "scheduler": self.scheduler}
        for _, x in denoise(model, model.noise(seeds), c, **settings):  # noqa: B007 (the last x is the picture)
            pass
        return model.decode(x)

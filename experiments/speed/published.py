"""The other side of every comparison: what the published scripts do, as plain code on diffusers.

ESD's loop (github.com/rohitgandikota/erasing) keeps a frozen and a trained copy of the denoiser. In each iteration it
follows one partial trajectory with the trained copy, and evaluates the frozen copy for the null prompt and the
concept separately. Here only the trained weights have gradients and the prompts are encoded once, both in favour of
this side.
"""

# C H W latent shape, L tokens, D text width.
import copy
import re
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor, nn


def pipeline(model) -> StableDiffusionPipeline:
    """diffusers' pipeline with the model's weights and DDIM."""
    pipe = StableDiffusionPipeline(**{**model.pipeline.components, "scheduler": None}, requires_safety_checker=False)
    pipe.scheduler = DDIMScheduler.from_config(model.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompts: list[str], latents: Tensor, steps: int, batch: int) -> Tensor:
    """Images (N, 3, height, width) in [0, 1], `batch` in a call."""
    options = {"num_inference_steps": steps, "guidance_scale": 7.5, "output_type": "pt"}
    calls = [slice(i, i + batch) for i in range(0, len(prompts), batch)]
    return torch.cat([pipe(prompts[i], latents=latents[i].to(pipe.dtype), **options).images.float() for i in calls])


class ESD:
    """Published ESD on a model: `teacher` is the model's own denoiser, `student` a deep copy of it."""

    def __init__(self, model, concept: str, *, parameters: str, lr: float, steps: int, guidance_scale: float):
        self.teacher: nn.Module = model.denoiser
        self.student: nn.Module = copy.deepcopy(model.denoiser)
        self.trained = [p for n, p in self.student.named_parameters() if re.search(parameters, n)]
        for p in self.trained:
            p.requires_grad_(True)
        self.optimizer = torch.optim.Adam(self.trained, lr=lr)
        self.scheduler = DDIMScheduler.from_config(model.scheduler.config)
        self.scheduler.set_timesteps(steps, device=model.device)
        self.null, self.c = (model.encode_prompts([text]).embeds for text in ("", concept))  # (1, L, D)
        self.model, self.steps, self.guidance_scale = model, steps, guidance_scale

    @torch.no_grad()
    def point(self) -> tuple[Tensor, Tensor]:
        """x_t (1, C, H, W) and t, at a random step of a guided trajectory of the student."""
        x = torch.randn(1, *self.model.latent_shape).to(self.model.device)
        stop = int(torch.randint(self.steps, ()))
        both = torch.cat([self.null, self.c])
        for t in self.scheduler.timesteps[:stop]:
            eps_0, eps_c = self.student(torch.cat([x, x]).to(both.dtype), t, both).sample.float().chunk(2)
            x = self.scheduler.step(eps_0 + self.guidance_scale * (eps_c - eps_0), t, x).prev_sample
        return x.to(both.dtype), self.scheduler.timesteps[stop]

    def iterate(self, seeds: range, eta: float = 1.0) -> Iterator[float]:
        """Runs an iteration for each seed and yields its loss."""
        for seed in seeds:
            torch.manual_seed(seed)
            x_t, t = self.point()
            with torch.no_grad():
                eps_0 = self.teacher(x_t, t, self.null).sample.float()
                eps_c = self.teacher(x_t, t, self.c).sample.float()
            loss = F.mse_loss(self.student(x_t, t, self.c).sample.float(), eps_0 - eta * (eps_c - eps_0))
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            yield loss.item()

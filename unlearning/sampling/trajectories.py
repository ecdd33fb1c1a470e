"""Where a trained method's latents come from: points (x_t, t) on trajectories of the model being trained."""

# B prompts, P points, C H W latent shape.
from abc import ABC, abstractmethod
from itertools import islice

import torch
from torch import Tensor

from unlearning.models.base import Conditioning, DiffusionModel
from unlearning.sampling.sampler import denoise


class Trajectory(ABC):
    """
    Args:
        steps, guidance_scale: Of the trajectories.
    """

    def __init__(self, steps: int = 50, guidance_scale: float = 3.0):
        self.steps, self.guidance_scale = steps, guidance_scale

    @abstractmethod
    def __call__(self, model: DiffusionModel, prompts: list[str]) -> tuple[Tensor, Tensor, Conditioning]:
        """Points x_t (P, C, H, W) with their timesteps (P,) and the conditioning they were drawn under."""

    def _denoise(self, model: DiffusionModel, c: Conditioning):
        noise = torch.randn(len(c), *model.latent_shape).to(model.device)
        return denoise(model, noise, c, steps=self.steps, guidance_scale=self.guidance_scale)


class Exact(Trajectory):
    """The papers': a fresh trajectory for every prompt of every iteration, left at a step drawn uniformly."""

    def __call__(self, model, prompts):
        c = model.encode_prompts(prompts)
        path = self._denoise(model, c)
        stop = int(torch.randint(self.steps, ()))
        t, x_t = next(islice(path, stop, None))
        return x_t, t.expand(len(x_t)), c


class Reuse(Trajectory):
    """Every point of a few whole trajectories, shuffled: the same distribution at a fraction of the evaluations.

    A point of Exact costs about `steps` evaluations of the denoiser, a point of Reuse two. The price is that a pool's
    last points come from the model as it was when the pool was drawn, trajectories × steps / points iterations ago.

    Args:
        trajectories: How many are drawn at a time, in one batch.
        points: How many points an iteration gets.
    """

    def __init__(self, steps: int = 50, guidance_scale: float = 3.0, trajectories: int = 4, points: int = 10):
        super().__init__(steps, guidance_scale)
        self.trajectories, self.points = trajectories, points
        self._pool: list[tuple[Tensor, Tensor, Conditioning]] = []

    def __call__(self, model, prompts):
        if len(self._pool) < self.points:
            self._pool = self._draw(model, prompts)
        batch, self._pool = self._pool[: self.points], self._pool[self.points :]
        x_t, t, c = zip(*batch, strict=True)
        return torch.stack(x_t), torch.stack(t), Conditioning.cat(c)

    def _draw(self, model, prompts):
        rows = [prompts[i % len(prompts)] for i in range(self.trajectories)]
        c = model.encode_prompts(rows)
        path = islice(self._denoise(model, c), self.steps)
        points = [(x, t, c[i : i + 1]) for t, x_t in path for i, x in enumerate(x_t)]
        return [points[i] for i in torch.randperm(len(points)).tolist()]

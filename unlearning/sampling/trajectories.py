"""Where a trained method's latents come from: points (x_t, t) on trajectories of the model being trained."""

# B batch: points an iteration, C H W latent shape.
from collections.abc import Iterable
from itertools import islice

import torch
from torch import Tensor

from unlearning.concepts import UserError
from unlearning.models.base import Conditioning, DiffusionModel
from unlearning.sampling.sampler import as_published, denoise

# x_t (B, C, H, W), t (B,), what their trajectories were told, and in words.
Batch = tuple[Tensor, Tensor, Conditioning, list[str]]


class Exact:
    """The papers': a fresh trajectory for every prompt of every iteration, left at a step drawn uniformly.

    Args:
        steps, guidance_scale: Of the trajectories.
        schedule: "diffusers": t is where x_t stands. "paper": as ESD's and UnGuide's scripts do, which drop the first
            timestep and draw t from a little above x_t's (sampler.as_published).
    """

    def __init__(self, steps: int = 50, guidance_scale: float = 3.0, schedule: str = "diffusers"):
        self.steps, self.guidance_scale, self.schedule = steps, guidance_scale, schedule

    def __call__(self, model: DiffusionModel, prompts: list[str]) -> Batch:
        """A point for each of the B prompts."""
        c = model.encode_prompts(prompts)
        path = self._denoise(model, c)
        t, x_t = self._point(path, int(torch.randint(self.steps, ())))
        return x_t, t.expand(len(x_t)), c, prompts

    def _denoise(self, model: DiffusionModel, c: Conditioning):
        noise = torch.randn(len(c), *model.latent_shape).to(model.device)
        settings = {"steps": self.steps, "guidance_scale": self.guidance_scale, "schedule": self.schedule}
        return denoise(model, noise, c, **settings)

    def _point(self, path: Iterable[tuple[Tensor, Tensor]], i: int) -> tuple[Tensor, Tensor]:
        """(t, x_t) of the i-th of `steps` places to leave a trajectory."""
        if self.schedule == "diffusers":
            return next(islice(path, i, None))
        done, asked = as_published(i, self.steps)
        t, x_t = next(islice(path, done, None))
        return torch.randint(asked.start, asked.stop, ()).to(t), x_t


class Reuse(Exact):
    """Every point of whole trajectories, shuffled: the same distribution at a fraction of the evaluations.

    A trajectory for each of a batch's prompts, all in one batch, gives the points of `steps` iterations. A point of
    Exact costs about `steps` evaluations of the denoiser, a point of Reuse two. The price is that a pool's last points
    come from the model as it was when the pool was drawn, `steps` iterations ago.
    """

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self._pool: list[tuple[Tensor, Tensor, Conditioning, str]] = []

    def __call__(self, model: DiffusionModel, prompts: list[str]) -> Batch:
        """As many points as there are prompts, of any of them."""
        B = len(prompts)
        while len(self._pool) < B:
            self._pool += self._draw(model, prompts)
        batch, self._pool = self._pool[:B], self._pool[B:]
        x_t, t, c, words = zip(*batch, strict=True)
        return torch.stack(x_t), torch.stack(t), Conditioning.cat(c), list(words)

    def _draw(self, model: DiffusionModel, prompts: list[str]) -> list[tuple[Tensor, Tensor, Conditioning, str]]:
        c = model.encode_prompts(prompts)
        path = list(self._denoise(model, c))
        places = [self._point(path, i) for i in range(self.steps)]
        points = [(x, t, c[i : i + 1], prompts[i]) for t, x_t in places for i, x in enumerate(x_t)]
        return [points[i] for i in torch.randperm(len(points)).tolist()]


def trajectory(kind: str, steps: int, guidance_scale: float, schedule: str = "diffusers") -> Exact:
    """`kind` is "exact" or "reuse". Raises UserError for any other."""
    kinds = {"exact": Exact, "reuse": Reuse}
    if kind not in kinds:
        raise UserError(f"There is no trajectory {kind!r}; there are {', '.join(kinds)}.")
    return kinds[kind](steps, guidance_scale, schedule)

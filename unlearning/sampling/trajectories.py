"""Where a trained method's latents come from: points (x_t, t) on trajectories of the model being trained."""

# B batch: points an iteration, C H W latent shape.
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor

from unlearning.errors import UserError
from unlearning.models.diffusion import Conditioning, DiffusionModel
from unlearning.sampling.sampler import as_published, denoise, skim

Batch = tuple[Tensor, Tensor, Conditioning, Tensor]  # x_t (B, C, H, W), t (B,), c, and what is to be predicted there
Target = Callable[[Tensor, Tensor, Conditioning, list[str]], Tensor]  # of x_t, t, c and the prompts that c encodes


class Exact:
    """The papers': a fresh trajectory for every prompt of every iteration, left at a step drawn uniformly.

    Args:
        steps, guidance_scale: Of the trajectories.
        schedule: "diffusers": t is where x_t stands. "paper": as ESD's and UnGuide's scripts do, which drop the first
            timestep and draw t from a little above x_t's (sampler.as_published).
    """

    def __init__(self, steps: int = 50, guidance_scale: float = 3.0, schedule: str = "diffusers"):
        self.steps, self.guidance_scale, self.schedule = steps, guidance_scale, schedule

    def __call__(self, model: DiffusionModel, prompts: list[str], target: Target) -> Batch:
        """A point for each of the B prompts."""
        c = model.encode_prompts(prompts)
        path = self._walk(denoise, model, c)
        t, x_t = self._point(path, int(torch.randint(self.steps, ())))
        t = t.expand(len(x_t))
        return x_t, t, c, target(x_t, t, c, prompts)

    def state(self) -> list:
        """What the next points depend on, beside the model: nothing."""
        return []

    def restore(self, state: list) -> None:
        pass

    def _walk(self, how, model: DiffusionModel, c: Conditioning) -> Iterator[tuple[Tensor, Tensor]]:
        noise = torch.randn(len(c), *model.latent_shape).to(model.device)
        settings = {"steps": self.steps, "guidance_scale": self.guidance_scale, "schedule": self.schedule}
        return how(model, noise, c, **settings)

    def _point(self, path: Iterable[tuple[Tensor, Tensor]], i: int) -> tuple[Tensor, Tensor]:
        """(t, x_t) of the i-th of `steps` places to leave a trajectory."""
        if self.schedule == "diffusers":
            return next(islice(path, i, None))
        done, asked = as_published(i, self.steps)
        t, x_t = next(islice(path, done, None))
        return torch.randint(asked.start, asked.stop, ()).to(t), x_t


class Reuse(Exact):
    """Points of whole trajectories, many of each: the same distribution at a fraction of the evaluations.

    A few trajectories are drawn in one batch, skimmed (sampler.skim), and their points shuffled; enough for `steps`
    iterations are kept, and their targets asked for many at once. A point of Exact costs about `steps` evaluations of
    the denoiser, a point of Reuse less than two. The price is that a pool's last points come from the model as it was
    `steps` iterations ago.
    """

    TRAJECTORIES = 4  # at least, so that neighbouring iterations do not see one picture only
    ASKED = 16  # points whose targets are asked for at once

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self._pool: list[tuple[Tensor, Tensor, Conditioning, Tensor]] = []

    def __call__(self, model: DiffusionModel, prompts: list[str], target: Target) -> Batch:
        """As many points as there are prompts, of any of them."""
        B = len(prompts)
        if len(self._pool) < B:
            self._pool = self._draw(model, prompts, target)
        batch, self._pool = self._pool[:B], self._pool[B:]
        x_t, t, c, targets = zip(*batch, strict=True)
        return torch.stack(x_t), torch.stack(t), Conditioning.cat(c), torch.stack(targets)

    def state(self) -> list[tuple]:
        """The points that are left."""
        return [(x_t, t, c.embeds, dict(c.extra), target) for x_t, t, c, target in self._pool]

    def restore(self, state: list[tuple]) -> None:
        self._pool = [(x_t, t, Conditioning(embeds, extra), target) for x_t, t, embeds, extra, target in state]

    def _draw(self, model: DiffusionModel, prompts: list[str], target: Target) -> list[tuple]:
        words = [prompts[i % len(prompts)] for i in range(max(self.TRAJECTORIES, len(prompts)))]
        told = model.encode_prompts(words)
        path = list(self._walk(skim, model, told))
        places = [self._point(path, i) for i in range(self.steps)]
        points = [(x, t, i) for t, x_t in places for i, x in enumerate(x_t)]
        kept = [points[i] for i in torch.randperm(len(points)).tolist()[: len(prompts) * self.steps]]
        pool = []
        for some in (kept[i : i + self.ASKED] for i in range(0, len(kept), self.ASKED)):
            x_t, t, rows = zip(*some, strict=True)
            c = told[list(rows)]
            targets = target(torch.stack(x_t), torch.stack(t), c, [words[i] for i in rows])
            pool += [(x_t[i], t[i], c[i : i + 1], targets[i]) for i in range(len(some))]
        return pool


def trajectory(kind: str, steps: int, guidance_scale: float, schedule: str = "diffusers") -> Exact:
    """`kind` is "exact" or "reuse". Raises UserError for any other."""
    kinds = {"exact": Exact, "reuse": Reuse}
    if kind not in kinds:
        raise UserError(f"There is no trajectory {kind!r}; there are {', '.join(kinds)}.")
    return kinds[kind](steps, guidance_scale, schedule)

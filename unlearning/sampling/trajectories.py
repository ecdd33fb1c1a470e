"""Latents for trained methods: points (x_t, t, c) on trajectories of the model that is trained."""

# B batch: points in an iteration, C H W latent shape.
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Literal

import torch
from torch import Tensor

from unlearning.errors import UserError
from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel
from unlearning.sampling.guidance import begin
from unlearning.sampling.sampler import Schedule, as_published, denoise, skim

Points = tuple[Tensor, Tensor, Conditioning]  # x_t (B, C, H, W), t (B,), and c, whose prompts are c.prompts
Kind = Literal["exact", "reuse"]


class Exact:
    """As in the papers: a new trajectory for every prompt of every iteration, up to a step that is drawn uniformly.

    Args:
        steps, guidance_scale: Number of steps and guidance scale of the trajectories.
        schedule: "diffusers": t is where x_t lies. "paper": as ESD's and UnGuide's scripts, which drop the first
            timestep and draw t from a little above x_t's (sampler.as_published).
        places: The steps, counted from noise, before which a trajectory may end; None for all of them.
    """

    def __init__(
        self,
        steps: int = 50,
        guidance_scale: float = 3.0,
        schedule: Schedule = "diffusers",
        places: range | None = None,
    ):
        self.steps, self.guidance_scale, self.schedule = steps, guidance_scale, schedule
        self.places = places or range(steps)
        if places and schedule == "paper":  # which counts from the image
            self.places = range(steps - places.stop, steps - places.start)

    def __call__(self, model: DiffusionModel, prompts: list[str]) -> Points:
        """A point for each of the B prompts."""
        c = model.encode_prompts(prompts)
        path = self._walk(denoise, model, c)
        t, x_t = self._point(path, self.places[int(torch.randint(len(self.places), ()))])
        return x_t, t.expand(len(x_t)), c

    def state(self) -> list:
        """The state for a checkpoint, which is empty."""
        return []

    def restore(self, state: list) -> None:
        """Restores a state."""

    def _walk(self, how, model: DiffusionModel, c: Conditioning) -> Iterator[tuple[Tensor, Tensor]]:
        noise = torch.randn(len(c), *model.latent_shape).to(model.device)
        return how(model, noise, begin(model, c, self.guidance_scale), steps=self.steps, schedule=self.schedule)

    def _point(self, path: Iterable[tuple[Tensor, Tensor]], i: int) -> tuple[Tensor, Tensor]:
        """(t, x_t) before the i-th of `steps` steps."""
        if self.schedule == "diffusers":
            return next(islice(path, i, None))
        taken, times = as_published(i, self.steps)
        t, x_t = next(islice(path, taken, None))
        return torch.randint(times.start, times.stop, ()).to(t), x_t


class Reuse(Exact):
    """Many points of each trajectory: the same distribution at a fraction of the evaluations.

    A few trajectories are computed in one batch (sampler.skim). Their points are shuffled, and enough of them are kept
    for `steps` iterations. A point of Exact takes about `steps` evaluations of the denoiser, a point of Reuse less than
    one. In return, the last points of a pool come from the model of `steps` iterations ago.
    """

    TRAJECTORIES = 4  # at least, so that neighbouring iterations do not see one image only

    def __init__(self, *args, **settings):
        super().__init__(*args, **settings)
        self._pool: list[Points] = []

    def __call__(self, model: DiffusionModel, prompts: list[str]) -> Points:
        """As many points as there are prompts, of any of them."""
        B = len(prompts)
        if len(self._pool) < B:
            self._pool = self._draw(model, prompts)
        batch, self._pool = self._pool[:B], self._pool[B:]
        x_t, t, c = zip(*batch, strict=True)
        return torch.stack(x_t), torch.stack(t), Conditioning.cat(c)

    def state(self) -> list[tuple]:
        """The unused points, for a checkpoint."""
        return [(x_t, t, c.embeds, dict(c.extra), c.prompts, dict(c.gains)) for x_t, t, c in self._pool]

    def restore(self, state: list[tuple]) -> None:
        """Restores the unused points."""
        self._pool = [(x_t, t, Conditioning(*c)) for x_t, t, *c in state]

    def _draw(self, model: DiffusionModel, prompts: list[str]) -> list[Points]:
        c = model.encode_prompts([prompts[i % len(prompts)] for i in range(max(self.TRAJECTORIES, len(prompts)))])
        path = list(self._walk(skim, model, c))
        places = [self._point(path, i) for i in self.places]
        points = [(x, t, c[i : i + 1]) for t, x_t in places for i, x in enumerate(x_t)]
        return [points[i] for i in torch.randperm(len(points)).tolist()[: len(prompts) * len(self.places)]]


def trajectory(
    kind: Kind, steps: int, guidance_scale: float, schedule: Schedule = "diffusers", places: range | None = None
) -> Exact:
    """The trajectories of a kind: "exact" or "reuse". Raises UserError for any other."""
    kinds = {"exact": Exact, "reuse": Reuse}
    if kind not in kinds:
        raise UserError(f"There is no trajectory {kind!r}. Trajectories: {', '.join(kinds)}.")
    return kinds[kind](steps, guidance_scale, schedule, places)

"""Where a trained method's latents come from: points (x_t, t) on trajectories of the model being trained."""

# B batch: points an iteration, C H W latent shape.
from itertools import islice

import torch
from torch import Tensor

from unlearning.concepts import UserError
from unlearning.models.base import Conditioning, DiffusionModel
from unlearning.sampling.sampler import denoise

Batch = tuple[Tensor, Tensor, Conditioning]  # x_t (B, C, H, W), t (B,), and what the trajectories were told


class Exact:
    """The papers': a fresh trajectory for every prompt of every iteration, left at a step drawn uniformly.

    Args:
        steps, guidance_scale: Of the trajectories.
    """

    def __init__(self, steps: int = 50, guidance_scale: float = 3.0):
        self.steps, self.guidance_scale = steps, guidance_scale

    def __call__(self, model: DiffusionModel, prompts: list[str]) -> Batch:
        """A point for each of the B prompts."""
        c = model.encode_prompts(prompts)
        path = self._denoise(model, c)
        stop = int(torch.randint(self.steps, ()))
        t, x_t = next(islice(path, stop, None))
        return x_t, t.expand(len(x_t)), c

    def _denoise(self, model: DiffusionModel, c: Conditioning):
        noise = torch.randn(len(c), *model.latent_shape).to(model.device)
        return denoise(model, noise, c, steps=self.steps, guidance_scale=self.guidance_scale)


class Reuse(Exact):
    """Every point of a few whole trajectories, shuffled: the same distribution at a fraction of the evaluations.

    A point of Exact costs about `steps` evaluations of the denoiser, a point of Reuse two. The price is that a pool's
    last points come from the model as it was when the pool was drawn, up to POOL × steps / B iterations ago.
    """

    POOL = 4  # trajectories drawn at a time, in one batch

    def __init__(self, steps: int = 50, guidance_scale: float = 3.0):
        super().__init__(steps, guidance_scale)
        self._pool: list[Batch] = []

    def __call__(self, model: DiffusionModel, prompts: list[str]) -> Batch:
        """As many points as there are prompts, of any of them."""
        B = len(prompts)
        while len(self._pool) < B:
            self._pool += self._draw(model, prompts)
        batch, self._pool = self._pool[:B], self._pool[B:]
        x_t, t, c = zip(*batch, strict=True)
        return torch.stack(x_t), torch.stack(t), Conditioning.cat(c)

    def _draw(self, model: DiffusionModel, prompts: list[str]) -> list[Batch]:
        c = model.encode_prompts([prompts[i % len(prompts)] for i in range(self.POOL)])
        path = islice(self._denoise(model, c), self.steps)
        points = [(x, t, c[i : i + 1]) for t, x_t in path for i, x in enumerate(x_t)]
        return [points[i] for i in torch.randperm(len(points)).tolist()]


def trajectory(kind: str, steps: int, guidance_scale: float) -> Exact:
    """`kind` is "exact" or "reuse". Raises UserError for any other."""
    kinds = {"exact": Exact, "reuse": Reuse}
    if kind not in kinds:
        raise UserError(f"There is no trajectory {kind!r}; there are {', '.join(kinds)}.")
    return kinds[kind](steps, guidance_scale)

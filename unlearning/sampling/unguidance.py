"""UnGuide's analysis and its guidance (arXiv:2508.05755): how much an adapter changes a prompt, and what follows.

    D(p) = mean_r || eps_LoRA(z_r, t_r, p) - eps*(z_r, t_r, p) ||_2

z_r is the base model's latent a few steps on its way from the noise x_T,r to an image of p; noise and t_r are the same
for all prompts. A prompt with D(p) above a threshold is about the erased concept, and

    eps = w CFG(eps*) + (1 - w) CFG(eps_LoRA),    w = w_1 if D(p) > threshold, else w_2.

w = 0 is the adapter alone and w = 1 the base model; w_1 = -1 extrapolates past the adapter, away from the base model;
w_2 = 2 past the base model, away from the adapter.
"""

# N prompts, R repeats, B rows of a batch: a prompt and a repeat each.
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice

import torch
from torch import Tensor

from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.guidance import Guidance, Scale, Walk
from unlearning.sampling.guidance import ClassifierFree, classifier_free
from unlearning.sampling.sampler import Schedule, as_published, denoise, per_row
from unlearning.store.files import digest


@dataclass(frozen=True)
class LatentDifference:
    """The latent difference D(p) of prompts.

    Args:
        repeats: R.
        steps, stop: Number of steps of a whole trajectory, and of those that are taken.
        schedule: "paper", as the authors' script: the first timestep is dropped, and t_r is drawn from 800 to 819 while
            the latent lies at 761 (of 50 steps, 10 taken); "diffusers": no timestep is dropped and t_r is where the
            latent lies, 781.
        seed: Of the noise and of t_r.
        batch_size: Number of rows in one batch; it affects speed and memory only.
    """

    repeats: int = 10
    steps: int = 50
    stop: int = 10
    schedule: Schedule = "paper"
    seed: int = 42
    batch_size: int = field(default=32, compare=False)

    @torch.no_grad()
    def summands(self, model: DiffusionModel, adapter: str, c: Conditioning, scale: Scale) -> Tensor:
        """The summands of D, (N, R), for N prompts.

        Args:
            adapter: The set of side modules whose effect is measured; the base model is `model` without it.
            scale: Guidance scale of the base model's trajectories, a number or (N,).

        The rows of all prompts and repeats share batches: (stop + 2) calls of the denoiser a batch.
        """
        seeds = [self.seed + r for r in range(self.repeats)]
        noise, t = model.noise(seeds), self._times(seeds).to(model.device)
        n, r = (i.flatten() for i in torch.meshgrid(torch.arange(len(c)), torch.arange(self.repeats), indexing="ij"))
        scale = torch.as_tensor(scale, dtype=noise.dtype).flatten().expand(len(c))
        parts = [
            self._batch(model, adapter, c[rows], noise[repeats], t[repeats], scale[rows])
            for rows, repeats in zip(n.split(self.batch_size), r.split(self.batch_size), strict=True)
        ]
        return torch.cat(parts).reshape(len(c), self.repeats)

    def _times(self, seeds: Sequence[int]) -> Tensor:
        _, times = as_published(self.steps - self.stop, self.steps)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return torch.stack([torch.randint(times.start, times.stop, (), generator=g) for g in generators])

    def _batch(
        self, model: DiffusionModel, adapter: str, c: Conditioning, noise: Tensor, t: Tensor, scale: Tensor
    ) -> Tensor:
        base = model.without(adapter)
        walk = ClassifierFree().begin(base, c, per_row(scale.to(noise.device)))
        path = denoise(base, noise, walk, steps=self.steps, schedule=self.schedule)
        here, z = next(islice(path, self.stop, None))
        t = here.expand(len(z)) if self.schedule == "diffusers" else t
        return (model.predict(z, t, c) - base.predict(z, t, c)).flatten(1).norm(dim=1)


@dataclass(frozen=True, kw_only=True)
class UnGuidance(LatentDifference, Guidance):
    """UnGuide's guidance.

    Args:
        threshold: A prompt with a larger D(p) is about the erased concept.
        empty: D(""), for comparison; the paper's threshold.
        w_1, w_2: The base model's share for such prompts, and for all others.
        adapter: The name of the set of side modules; the erasure sets it when it is applied.
    """

    threshold: float
    empty: float = 0.0
    w_1: float = -1.0
    w_2: float = 2.0
    adapter: str = field(default="", compare=False)

    def of(self, adapter: str) -> "UnGuidance":
        """This guidance with the name of the attached adapter."""
        return replace(self, adapter=adapter)

    def begin(self, model: DiffusionModel, c: Conditioning, scale: Scale) -> Walk:
        """A walk whose w of each prompt follows from D(p)."""
        D = self.differences(model, c, scale)
        w = torch.where(D.gt(self.threshold), self.w_1, self.w_2)
        null = model.encode_prompts([""])

        def blend(x_t: Tensor, t: Tensor, c: Conditioning, step: int) -> Tensor:
            return blended(model, self.adapter, w, x_t, t, c, null.at(step), scale)

        return Walk(c, blend, {"D": D.tolist(), "w": w.tolist()})

    def differences(self, model: DiffusionModel, c: Conditioning, scale: Scale) -> Tensor:
        """D (N,). Values for the same model, prompt and scale are cached."""
        scale = torch.as_tensor(scale, dtype=torch.float32).flatten().expand(len(c))
        keys = [
            digest(model.state, model.latent_shape, row.detach().float().cpu().numpy().tobytes().hex(), s)
            for row, s in zip(c.embeds, scale.tolist(), strict=True)
        ]
        new = list({k: i for i, k in enumerate(keys) if k not in self._known}.values())
        if new:
            D = self.summands(model, self.adapter, c[new], scale[new]).mean(1)
            self._known.update(zip([keys[i] for i in new], D.tolist(), strict=True))
        return torch.tensor([self._known[k] for k in keys], device=c.embeds.device)

    @cached_property
    def _known(self) -> dict[str, float]:
        return {}


def blended(
    model: DiffusionModel,
    adapter: str,
    w: Tensor,
    x_t: Tensor,
    t: Tensor,
    c: Conditioning,
    null: Conditioning,
    scale: Scale,
) -> Tensor:
    """w CFG(eps*) + (1 - w) CFG(eps_LoRA), w (B,): each row has its own; all branches in one call of the denoiser."""
    if w.eq(0).all() or w.eq(1).all():
        return classifier_free(model if w.eq(0).all() else model.without(adapter), x_t, t, c, null, scale)
    off, on = (c.with_gains({adapter: gain}) for gain in (torch.zeros_like(w), torch.ones_like(w)))
    t = torch.cat([t, t]) if t.ndim else t
    scale = torch.cat([scale, scale]) if isinstance(scale, Tensor) and scale.ndim else scale
    both = classifier_free(model, torch.cat([x_t, x_t]), t, Conditioning.cat([off, on]), null, scale)
    base, unlearned = both.chunk(2)
    return per_row(w) * base + (1 - per_row(w)) * unlearned

"""Latent inversion: noise from which the erased model draws an image of the concept.

An image by the unedited model is inverted to noise, and the noise is sampled from again, with the erased model:
Memories of Forgotten Concepts (Rusanovsky et al., CVPR 2025, arXiv:2501.00782), M-ErasureBench's third modality
(arXiv:2512.22877), and TINA, without any text. "white": the erased model inverts; "black": the unedited one does.

Any smooth network can nearly return any image, so that a hit shows that the image is invertible, not that it is
remembered. The record therefore has what Memories measures: the negative log-likelihood of the noise under N(0, I), in
nats for each dimension, and the squared 2-Wasserstein distance between the Gaussians fitted to it and to that of fresh
noise; and the same attack on `method=none` and on `method=oracle` belongs beside every number.

Published: Memories has the image's own prompt, guidance 1, 50 DDIM steps and 5 refinements (`prompt=own
guidance_scale=1`). TINA has no text, and 25 steps of AdamW at a rate of 1e-3 in place of the fixed point (`prompt=empty
solver=descent refinements=25`). The default is TINA's prompt with Memories' solver: without text, the guidance of the
sampler is part of the inversion at no cost, also one that an erasure has changed.

Deviation: both sample with the solver that inverted; TINA's authors sample with LMS.
"""

# B batch, N rows, C H W latent shape.
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Literal

import torch
from torch import Tensor

from unlearning.attacks.base import Attack
from unlearning.attacks.latents import latents_of
from unlearning.concepts import UnlearningTask
from unlearning.config.values import Finite, Natural, Positive, Steps
from unlearning.models.diffusion import DiffusionModel
from unlearning.sampling.attack_result import AttackedPrompt, AttackResult, Restored
from unlearning.sampling.guidance import begin
from unlearning.sampling.inverse import Solver, noise_of
from unlearning.sampling.sampler import Sampler
from unlearning.store.loops import resumed
from unlearning.store.manifest import ManifestRow

PROMPTS = {"neutral": "a photo", "empty": ""}


class Inversion(Attack[DiffusionModel, Tensor]):
    """Inverts images of the concept to noise.

    Args:
        images: Draws the unedited model's images.
        prompt: The prompt of inversion and sampling: the image's "own" prompt, a "neutral" one, or the "empty" one.
        steps: Of inversion and sampling.
        guidance_scale: Of both.
        refinements: Evaluations at each step, after the first.
        solver, learning_rate: See `noise_of` (sampling/inverse.py).
        transfer: Whether the unedited model inverts: a black-box attack.
    """

    own_size = True

    def __init__(
        self,
        *,
        images: Sampler,
        prompt: Literal["own", "neutral", "empty"] = "empty",
        steps: Steps = 50,
        guidance_scale: Finite = 7.5,
        refinements: Natural = 5,
        solver: Solver = "fixed_point",
        learning_rate: Positive = 1e-3,
        transfer: bool = False,
    ):
        self.images, self.prompt, self.steps, self.guidance_scale = images, prompt, steps, guidance_scale
        self.refinements, self.solver, self.learning_rate = refinements, solver, learning_rate
        self.transfer, self.access = transfer, "black" if transfer else "white"

    def observe(
        self, model: DiffusionModel, task: UnlearningTask, rows: Sequence[ManifestRow]
    ) -> Tensor | AttackResult:
        """Latents (N, C, H, W) of the unedited model's images; with `transfer`, the noise that it finds for them."""
        x_0 = latents_of(model, self.images, rows)
        return self.find(model, task, rows, x_0) if self.transfer else x_0

    def find(
        self, model: DiffusionModel, task: UnlearningTask, rows: Sequence[ManifestRow], observed: Tensor
    ) -> AttackResult:
        noise = self._noise(model, observed, rows)
        likelihood, fresh = _nll(noise), _nll(model.noise([row.seed for row in rows]))
        attacked = tuple(
            AttackedPrompt(row.prompt, self._prompt(row), row.seed, {"latents": z}, {"nll": nll})
            for row, z, nll in zip(rows, noise, likelihood.tolist(), strict=True)
        )
        record = {name: getattr(self, name) for name in ("prompt", "steps", "refinements", "solver", "transfer")}
        record |= {"nll": likelihood.mean().item(), "nll of noise": fresh.mean().item()}
        return AttackResult(attacked, record | {"wasserstein": _wasserstein(likelihood, fresh)})

    def sampler(self, sampler: Sampler) -> Sampler:
        return Returning(self.steps, self.guidance_scale).batched_as(sampler)

    def _prompt(self, row: ManifestRow) -> str:
        return PROMPTS.get(self.prompt, row.prompt)

    def _noise(self, model: DiffusionModel, x_0: Tensor, rows: Sequence[ManifestRow]) -> Tensor:
        size, now = self.images.batch_size, SimpleNamespace(parts=[])
        for i in resumed(range(0, len(rows), size), "inverting", now):
            c = model.encode_prompts([self._prompt(row) for row in rows[i : i + size]])
            walk = begin(model, c, self.guidance_scale)
            noise = noise_of(
                model, x_0[i : i + size], walk, steps=self.steps, refinements=self.refinements, solver=self.solver,
                learning_rate=self.learning_rate,
            )  # fmt: skip
            now.parts.append(noise.cpu())
        return torch.cat(now.parts).to(x_0)


class Returning(Sampler):
    """Samples at the guidance scale of the inversion, whatever a row's own is."""

    def sample(
        self, model: DiffusionModel, batch: Restored, scales: Sequence[float | None] = ()
    ) -> tuple[Tensor, list[dict[str, float]]]:
        return super().sample(model, batch)


def _nll(noise: Tensor) -> Tensor:
    """The negative log-likelihood under N(0, I) for each dimension of noise (N, C, H, W), (N,)."""
    return 0.5 * (noise.square().flatten(1).mean(1) + math.log(2 * math.pi))


def _wasserstein(a: Tensor, b: Tensor) -> float:
    """(mu_a - mu_b)^2 + (sigma_a - sigma_b)^2: between Gaussians fitted to two samples, (N,) each."""
    spread = [sample.std(correction=0) for sample in (a, b)]
    return float((a.mean() - b.mean()).square() + (spread[0] - spread[1]).square())

"""Diffusion completion: the unedited model begins an image, the erased one finishes it.

One of the probes of When Are Concepts Erased From Diffusion Models? (Lu et al., 2025, arXiv:2505.17013). The unedited
model takes the first steps of a trajectory, with the same prompt, seed and guidance; the erased model takes the others.
The paper has 5 and 10 of 50 DDIM steps. An eraser that only diverts the beginning of the trajectory lets the concept
through.

Deviation: the model's own solver in place of DDIM where a model has another.
"""

from collections.abc import Iterator, Sequence
from itertools import islice

import torch
from torch import Tensor

from unlearning.attacks.base import Attack
from unlearning.concepts import UnlearningTask
from unlearning.config.values import Part
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.guidance import Walk
from unlearning.sampling.attack_result import AttackedPrompt, AttackResult, Tensors
from unlearning.sampling.sampler import Sampler, denoise
from unlearning.store.manifest import ManifestRow


class Completion(Attack[DiffusionModel, Tensor]):
    """Completes trajectories that the unedited model has begun.

    Args:
        images: The sampler of the evaluation.
        begun: The share of the steps that the unedited model takes, and at least one of them.
    """

    access = "white"
    own_size = True

    def __init__(self, *, images: Sampler, begun: Part = 0.1):
        self.images, self.begun = images, begun

    @torch.no_grad()
    def observe(self, model: DiffusionModel, task: UnlearningTask, rows: Sequence[ManifestRow]) -> Tensor:
        """Latents (N, C, H, W) after the first steps."""
        parts, size = [], self.images.batch_size
        for i in range(0, len(rows), size):
            batch = rows[i : i + size]
            c = model.encode_prompts([row.prompt for row in batch])
            walk = self.images.begin(model, c, [row.guidance_scale for row in batch])
            path = denoise(model, model.noise([row.seed for row in batch]), walk, steps=self.images.steps)
            parts.append(next(islice(path, self._steps, None))[1])
        return torch.cat(parts)

    def find(
        self, model: DiffusionModel, task: UnlearningTask, rows: Sequence[ManifestRow], observed: Tensor
    ) -> AttackResult:
        pairs = zip(rows, observed, strict=True)
        attacked = tuple(AttackedPrompt(row.prompt, row.prompt, row.seed, {"latents": x}) for row, x in pairs)
        return AttackResult(attacked, {"begun": self._steps, "steps": self.images.steps})

    def sampler(self, sampler: Sampler) -> Sampler:
        return Finishing(sampler.steps, sampler.guidance_scale, begun=self._steps).batched_as(sampler)

    @property
    def _steps(self) -> int:
        return max(1, round(self.begun * self.images.steps))


class Finishing(Sampler):
    """Takes the remaining steps of trajectories. Args: as Sampler's; begun: the steps that were taken."""

    def __init__(self, *args, begun: int, **settings):
        super().__init__(*args, **settings)
        self.begun = begun

    @property
    def protocol(self) -> str:
        return f"{super().protocol}, {self.begun} taken before"

    def trajectory(
        self, model: DiffusionModel, x: Tensor, walk: Walk, given: Sequence[Tensors]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        return denoise(model, x, walk, steps=self.steps, start=self.begun)

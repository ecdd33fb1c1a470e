"""Inpainting: the erased model completes an image of the concept whose centre is missing.

A probe of When Are Concepts Erased From Diffusion Models? (Lu et al., 2025, arXiv:2505.17013). The unedited model's
image keeps its border; the erased model draws the central square of half the side, with the same prompt, and only that
square is judged. As the denoiser takes no mask, the border of every x_t is the image's own, noised to t (RePaint,
Lugmayr et al., CVPR 2022), as diffusers' inpainting does for such a denoiser.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from unlearning.attacks.base import Attack
from unlearning.attacks.latents import latents_of
from unlearning.concepts import UnlearningTask
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.guidance import Walk
from unlearning.sampling.attack_result import AttackedPrompt, AttackResult, Tensors, stacked
from unlearning.sampling.sampler import Sampler, denoise
from unlearning.store.manifest import ManifestRow


class Inpainting(Attack[DiffusionModel, Tensor]):
    """Lets the erased model inpaint images of the concept.

    Args:
        images: Draws the unedited model's images.
    """

    access = "white"
    own_size = True

    def __init__(self, *, images: Sampler):
        self.images = images

    def observe(self, model: DiffusionModel, task: UnlearningTask, rows: Sequence[ManifestRow]) -> Tensor:
        """Latents (N, C, H, W) of the unedited model's images."""
        return latents_of(model, self.images, rows)

    def find(
        self, model: DiffusionModel, task: UnlearningTask, rows: Sequence[ManifestRow], observed: Tensor
    ) -> AttackResult:
        height, width = model.decode(observed[:1]).shape[-2:]
        centre = (width // 4, height // 4, width - width // 4, height - height // 4)
        pairs = zip(rows, observed, strict=True)
        return AttackResult(tuple(
            AttackedPrompt(row.prompt, row.prompt, row.seed, {"image": z}, judged=centre) for row, z in pairs
        ))  # fmt: skip

    def sampler(self, sampler: Sampler) -> Sampler:
        return Inpainter(sampler.steps, sampler.guidance_scale).batched_as(sampler)


class Inpainter(Sampler):
    """Draws the centre of images whose border is given."""

    @property
    def protocol(self) -> str:
        return f"{super().protocol}, the centre inpainted"

    def trajectory(
        self, model: DiffusionModel, x: Tensor, walk: Walk, given: Sequence[Tensors]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        known, eps = stacked(given, "image", x), x
        mask = torch.zeros_like(x[:1, :1])
        height, width = mask.shape[-2:]
        mask[..., height // 4 : height - height // 4, width // 4 : width - width // 4] = 1

        def step(noise, prediction: Tensor, t: Tensor, x: Tensor) -> Tensor:
            x = noise.step(prediction, t, x).prev_sample
            later = noise.timesteps[noise.timesteps < t]
            border = model.add_noise(known, eps, later[0].expand(len(x))) if len(later) else known
            return mask * x + (1 - mask) * border

        return denoise(model, x, walk, steps=self.steps, step=step)

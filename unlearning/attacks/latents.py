"""Latents of the unedited model's images, from which attacks start."""

# N rows, C H W latent shape.
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from unlearning.models.diffusion import DiffusionModel
from unlearning.sampling.sampler import Sampler
from unlearning.store.manifest import ManifestRow, batches


@torch.no_grad()
def latents_of(model: DiffusionModel, sampler: Sampler, rows: Sequence[ManifestRow]) -> Tensor:
    """Latents (N, C, H, W) of the images that the model generates for the rows, decoded and encoded again."""
    latents: dict[Path, Tensor] = {}
    for batch in batches(rows, sampler.batch_size):
        images, _ = sampler.draw(model, batch)
        latents |= zip((row.path for row in batch), model.encode_images(images).split(1), strict=True)
    # In the order of the rows, and in the memory layout of the encoder's output, which torch.stack would change.
    return torch.cat([latents[row.path] for row in rows])

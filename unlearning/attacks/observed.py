"""What attacks take from the unedited model: its images of the evaluation's prompts, at the evaluation's seeds."""

# N rows, C H W latent shape.
from collections.abc import Sequence

import torch
from torch import Tensor

from unlearning.models.diffusion import DiffusionModel
from unlearning.sampling.sampler import Sampler
from unlearning.store.manifest import ManifestRow


@torch.no_grad()
def latents_of(model: DiffusionModel, sampler: Sampler, rows: Sequence[ManifestRow]) -> Tensor:
    """Latents (N, C, H, W) of the images that the model generates for the rows, decoded and encoded again."""
    parts = []
    for i in range(0, len(rows), sampler.batch_size):
        images, _ = sampler.draw(model, rows[i : i + sampler.batch_size])
        parts.append(model.encode_images(images))
    return torch.cat(parts)

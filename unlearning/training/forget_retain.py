"""Batches of tensors of forget and retain images."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from unlearning.data.generated import Generated
from unlearning.errors import UserError
from unlearning.models.diffusion import DiffusionModel
from unlearning.training.batches import Batches, seed_of

AT_ONCE = 16  # images in memory


def encoded(model: DiffusionModel, images: Sequence[np.ndarray]) -> Tensor:
    """Latents (N, C, H, W) of images (height, width, 3) uint8, encoded in small batches.

    Raises:
        UserError: If their size is not the one that the model generates.
    """
    parts = []
    for i in range(0, len(images), AT_ONCE):
        batch = torch.from_numpy(np.stack(images[i : i + AT_ONCE])).permute(0, 3, 1, 2) / 255
        parts.append(model.encode_images(batch))
        if parts[-1].shape[1:] != model.latent_shape:
            side = batch.shape[-1] * model.latent_shape[-1] // parts[-1].shape[-1]
            raise UserError(
                f"{model.name} generates images of {side} pixels, and these have {batch.shape[-1]}: "
                f"dataset.size={side}."
            )
    return torch.cat(parts) if parts else torch.empty(0, *model.latent_shape, device=model.device)


def drawn(model: DiffusionModel, generated: Generated, prompts: Sequence[str], count: int) -> tuple[Tensor, Tensor]:
    """Latents (N, C, H, W) of images that the model generates for the prompts in turn, and the prompts' indices."""
    x_0 = encoded(model, generated(model, prompts, count))
    return x_0, torch.arange(len(x_0), device=x_0.device) % len(prompts)


class ForgetRetain(Batches):
    """Batches {"forget": tuple, "retain": tuple}, shuffled; "retain" is omitted if there are no retain images.

    Args:
        find: Returns the tensors (N, ...) of the forget images and of the retain images; row i belongs to image i. It
            is called when training begins, by all processes of a distributed training at the same time.
        batch_size: Number of images of each kind in a batch.
        seed: Seed of the order. Every image occurs once before any image occurs again.
    """

    def __init__(self, find: Callable[[], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]], batch_size: int, seed: int):
        super().__init__()
        self.find, self.batch_size, self.seed = find, batch_size, seed

    def setup(self, stage: str) -> None:
        data = zip(("forget", "retain"), self.find(), strict=True)
        self.parts = {name: tensors for name, tensors in data if len(tensors[0])}

    def batch(self, k: int) -> dict[str, tuple[Tensor, ...]]:
        places = range(k * self.batch_size, (k + 1) * self.batch_size)
        chosen = {}
        for part, (name, tensors) in enumerate(self.parts.items()):
            N = len(tensors[0])
            rows = [_order(N, seed_of(self.seed, part, place // N))[place % N] for place in places]
            chosen[name] = tuple(tensor[rows] for tensor in tensors)
        return chosen


@lru_cache(maxsize=4)
def _order(N: int, seed: int) -> list[int]:
    return torch.randperm(N, generator=torch.Generator().manual_seed(seed)).tolist()

"""Forget and retain pictures side by side, as batches of tensors of a Lightning run."""

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from unlearning.errors import UserError
from unlearning.training.batches import Batches, seed_of

AT_ONCE = 16  # pictures in memory


def encoded(model, images: Sequence[np.ndarray]) -> Tensor:
    """Latents (N, C, H, W) of pictures (height, width, 3) uint8, a few of which are in memory at a time.

    Raises UserError where they are of another size than the model draws.
    """
    parts = []
    for i in range(0, len(images), AT_ONCE):
        pictures = torch.from_numpy(np.stack(images[i : i + AT_ONCE])).permute(0, 3, 1, 2) / 255
        parts.append(model.encode_images(pictures))
        if parts[-1].shape[1:] != model.latent_shape:
            asked = pictures.shape[-1] * model.latent_shape[-1] // parts[-1].shape[-1]
            raise UserError(
                f"{model.name} draws pictures of {asked} pixels, and these have {pictures.shape[-1]}: "
                f"dataset.size={asked}."
            )
    return torch.cat(parts) if parts else torch.empty(0, *model.latent_shape, device=model.device)


class ForgetRetain(Batches):
    """Batches {"forget": tuple, "retain": tuple}, shuffled; "retain" is missing where there is nothing to.

    Args:
        find: Gives the forget and the retain pictures as tensors (N, ...), of which one row of each is about one
            picture. Called when training begins, by all processes of a distributed one at once.
        batch_size: Pictures of each kind in a batch.
        seed: Of the order, in which every picture comes once before any comes again.
    """

    def __init__(self, find: Callable[[], tuple[tuple[Tensor, ...], tuple[Tensor, ...]]], batch_size: int, seed: int):
        super().__init__()
        self.find, self.batch_size, self.seed = find, batch_size, seed

    def setup(self, stage: str) -> None:
        found = zip(("forget", "retain"), self.find(), strict=True)
        self.parts = {name: tensors for name, tensors in found if len(tensors[0])}

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

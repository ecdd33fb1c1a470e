"""Forget and retain pictures side by side, as batches of tensors of a Lightning run."""

from collections.abc import Sequence

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from unlearning.concepts import UserError

AT_ONCE = 16  # pictures in a call of the autoencoder


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


class ForgetRetain(pl.LightningDataModule):
    """Batches {"forget": tuple, "retain": tuple}, shuffled, without end; "retain" is missing where there is nothing to.

    Args:
        forget, retain: Tensors (N, ...), of which one row of each is about one picture.
        batch_size: Pictures of each kind in a batch.
    """

    def __init__(self, forget: tuple[Tensor, ...], retain: tuple[Tensor, ...], batch_size: int):
        super().__init__()
        self.parts = {"forget": forget, "retain": retain}
        self.batch_size = batch_size

    def train_dataloader(self) -> CombinedLoader:
        loaders = {
            name: DataLoader(TensorDataset(*tensors), self.batch_size, shuffle=True)
            for name, tensors in self.parts.items()
            if len(tensors[0])
        }
        return CombinedLoader(loaders, "max_size_cycle")

"""Forget and retain pictures side by side, as batches of tensors of a Lightning run."""

import pytorch_lightning as pl
from pytorch_lightning.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset


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

"""Generates images into the store, as a Lightning prediction: the Trainer shows progress and distributes rows."""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from unlearning.models.base import Model
from unlearning.sampling.reconstruction import FAILED, Reconstruction
from unlearning.sampling.sampler import Sampler
from unlearning.store.images import write_image
from unlearning.store.locks import claimed
from unlearning.store.manifest import ManifestRow, missing

log = logging.getLogger(__name__)
OVERFLOW = "it holds values that are not finite; float16 overflows where model.dtype=bfloat16 and float32 do not"


class Generation(pl.LightningModule):
    """
    Args:
        model: Generates; any Model.
        sampler: Draws the images of manifest rows.
    """

    def __init__(self, model: Model, sampler: Sampler | Reconstruction):
        super().__init__()
        self.model: Any = model
        self.sampler = sampler
        self.left: list[ManifestRow] = []  # rows that another process was drawing already

    def transfer_batch_to_device(self, batch: list[ManifestRow], device, dataloader_idx: int) -> list[ManifestRow]:
        return batch  # rows hold no tensors

    def predict_step(self, rows: list[ManifestRow], batch_idx: int) -> int:
        """Draws the rows that no other process has claimed; returns how many."""
        with claimed(rows) as mine:
            self.draw(mine)
        self.left += missing(row for row in rows if row not in mine)
        if self.trainer.received_sigterm:  # Lightning reacts to it in training only
            raise SIGTERMException
        return len(mine)

    @torch.inference_mode()
    def finish(self) -> None:
        """Waits for the rows that other processes had claimed, and draws those that they did not."""
        for i in range(0, len(self.left), self.sampler.batch_size):
            with claimed(self.left[i : i + self.sampler.batch_size], wait=True) as mine:
                self.draw(mine)

    def draw(self, rows: list[ManifestRow]) -> None:
        """Generates the rows' images and saves those that are finite."""
        if not rows:
            return
        images, decisions = self.sampler.draw(self.model, rows)
        whole = images.isfinite().flatten(1).all(1).tolist()
        images = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for image, row, decided, finite in zip(images, rows, decisions, whole, strict=True):
            why = decided.get(FAILED) or (None if finite else OVERFLOW)  # it would be black and look erased
            if why:
                log.warning("%s could not be generated: %s", row.source or row.prompt, why)
            else:
                write_image(row.path, image, decided)


def generate(
    model: Model, sampler: Sampler | Reconstruction, rows: Sequence[ManifestRow], trainer: Callable[..., pl.Trainer]
) -> int:
    """Generates every image that is not in the store yet; returns how many were missing.

    Rows that another process is drawing are left to it, and waited for at the end. An image that fails is named in a
    warning and stays missing.
    """
    todo = missing(rows)
    if todo:
        generation = Generation(model, sampler)
        loader: DataLoader = DataLoader(todo, sampler.batch_size, collate_fn=list)  # type: ignore[arg-type]
        trainer().predict(generation, loader, return_predictions=False)
        generation.finish()
    return len(todo)

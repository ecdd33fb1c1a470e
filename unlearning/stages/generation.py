"""Generates images into the store, as a Lightning prediction: the Trainer shows progress and distributes rows."""

import logging
from collections.abc import Sequence
from functools import partial
from math import ceil
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import rank_zero_only
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader
from tqdm import tqdm

from unlearning.errors import UserError
from unlearning.models.base import Model
from unlearning.sampling.reconstruction import FAILED, Reconstruction
from unlearning.sampling.sampler import Sampler
from unlearning.store.images import write_image
from unlearning.store.locks import claimed
from unlearning.store.manifest import ManifestRow, batches, missing
from unlearning.store.ranks import of_first_rank
from unlearning.training.trainers import shows_progress, without_bar

log = logging.getLogger(__name__)
OVERFLOW = "it holds values that are not finite; float16 overflows where model.dtype=bfloat16 and float32 do not"


class Generation(pl.LightningModule):
    """Generates the images of manifest rows.

    Args:
        model: The model, of any family.
        sampler: Generates images of the model.
        bar: The progress bar, which counts the images.
    """

    def __init__(self, model: Model, sampler: Sampler | Reconstruction, bar: tqdm):
        super().__init__()
        self.model: Any = model
        self.sampler: Any = sampler
        self.bar = bar
        self.left: list[ManifestRow] = []  # rows that another process had claimed
        self.size = sampler.batch_size  # halved when memory is too small

    def transfer_batch_to_device(self, batch: list[ManifestRow], device, dataloader_idx: int) -> list[ManifestRow]:
        """Returns the batch itself."""
        return batch  # rows hold no tensors

    def predict_step(self, rows: list[ManifestRow], batch_idx: int) -> int:
        """Generates the rows that no other process has claimed; returns their number."""
        with claimed(rows) as mine:
            self.draw(mine)
        self.left += missing(row for row in rows if row not in mine)
        self.heed_sigterm()
        return len(mine)

    def heed_sigterm(self, *_: object) -> None:
        """Ends the prediction after a SIGTERM, which Lightning itself handles during training only."""
        if self.trainer.received_sigterm:
            raise SIGTERMException

    @torch.inference_mode()
    def finish(self) -> None:
        """Waits for rows that other processes have claimed, and generates those that they left missing."""
        for i in range(0, len(self.left), self.sampler.batch_size):
            with claimed(self.left[i : i + self.sampler.batch_size], wait=True) as mine:
                self.draw(mine)

    def draw(self, rows: list[ManifestRow]) -> None:
        """Generates the rows' images and saves those that are finite. Halves the batch if memory is too small.

        Raises:
            UserError: If memory is too small for one image, or for half of a batch of the user's own size.
        """
        size = min(self.size, len(rows)) or 1
        try:
            for batch in batches(rows, size):
                self._draw(batch)
            return
        except torch.OutOfMemoryError as error:
            if size == 1 or (self.size < self.sampler.batch_size and not self.sampler.automatic):
                raise UserError(
                    f"The accelerator's memory is too small for {size} images at once. Less is needed "
                    "with a smaller sampler.batch_size, model.attention_slicing=true or model.offload=true."
                ) from error
        self.size = (size + 1) // 2  # outside of the handler, whose traceback holds tensors
        level = logging.INFO if self.sampler.automatic else logging.WARNING
        log.log(
            level, "The accelerator's memory is too small for %d images at once; half as many are generated at once "
            "from here on: sampler.batch_size=%d. It changes no image.", size, self.size,
        )  # fmt: skip
        if self.sampler.automatic:
            self.sampler.batch_size = self.size  # for the images that follow
        torch.cuda.empty_cache()
        self.draw(missing(rows))

    def _draw(self, rows: list[ManifestRow]) -> None:
        images, decisions = self.sampler.draw(self.model, rows)
        self.bar.update(len(rows))
        whole = images.isfinite().flatten(1).all(1).tolist()
        images = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for image, row, decided, finite in zip(images, rows, decisions, whole, strict=True):
            why = decided.get(FAILED) or (None if finite else OVERFLOW)  # it would be black and look erased
            if why:
                log.warning("%s could not be generated: %s", row.source or row.prompt, why)
            else:
                write_image(row.path, image, decided)


def generate(
    model: Model,
    sampler: Sampler | Reconstruction,
    rows: Sequence[ManifestRow],
    trainer: partial[pl.Trainer],
    label: str = "images",
) -> int:
    """Generates every image that is not in the store yet; returns how many were missing.

    Rows that another process is generating are left to it; this function waits for them at the end. If an image fails,
    a warning names it, and it stays missing.

    Args:
        label: Label of the progress bar.
    """
    absent = of_first_rank(lambda: missing(rows))  # other runs write to the store, too
    todo = [row for batch in batches(absent, sampler.batch_size) for row in batch]  # images of one size together
    if todo:
        hidden = not shows_progress(trainer) or rank_zero_only.rank > 0
        bar = tqdm(total=len(todo), desc=label, unit="image", leave=False, disable=hidden)
        generation, own = Generation(model, sampler, bar), without_bar(trainer)()
        processes = own.num_devices * own.num_nodes
        shared = todo * ceil(processes / len(todo))  # Lightning needs a row for each; the first to claim it draws it
        loader: DataLoader = DataLoader(shared, sampler.batch_size, collate_fn=list)  # type: ignore[arg-type]
        # Also within a batch. An image-to-image model calls its network's parts directly.
        networks = (model.network, *model.network.children())
        hooks = [network.register_forward_pre_hook(generation.heed_sigterm) for network in networks]
        try:
            with bar:
                own.predict(generation, loader, return_predictions=False)
                generation.finish()
        finally:
            for hook in hooks:
                hook.remove()
    return len(todo)

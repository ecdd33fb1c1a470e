"""Pictures into the store, as a Lightning prediction: the Trainer brings the progress bar and shares rows out."""

import logging
from collections.abc import Callable, Sequence

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from unlearning.images import Row, missing, save
from unlearning.sampling.reconstruction import FAILED, Reconstruction
from unlearning.sampling.sampler import Sampler

log = logging.getLogger(__name__)


class Generation(pl.LightningModule):
    def __init__(self, model, sampler: Sampler | Reconstruction):
        super().__init__()
        self.model, self.sampler = model, sampler

    def transfer_batch_to_device(self, batch: list[Row], device, dataloader_idx: int) -> list[Row]:
        return batch  # rows hold no tensors

    def predict_step(self, rows: list[Row], batch_idx: int) -> int:
        images, decisions = self.sampler.draw(self.model, rows)
        images = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for image, row, decided in zip(images, rows, decisions, strict=True):
            if FAILED in decided:
                log.warning("%s is not put out: %s", row.source or row.prompt, decided[FAILED])
            else:
                save(image, row, decided)
        return len(rows)


def generate(model, sampler: Sampler | Reconstruction, rows: Sequence[Row], trainer: Callable[..., pl.Trainer]) -> int:
    """Draws every picture that is not in the store yet; returns how many there were to draw.

    What fails on the way is named in a warning, and missing from the store afterwards.
    """
    todo = missing(rows)
    if todo:
        loader = DataLoader(todo, batch_size=sampler.batch_size, collate_fn=list)
        trainer().predict(Generation(model, sampler), loader, return_predictions=False)
    return len(todo)

"""Pictures into the store, as a Lightning prediction: the Trainer brings the progress bar and shares rows out."""

from collections.abc import Callable, Sequence

import pytorch_lightning as pl
from torch.utils.data import DataLoader

from unlearning.images import Row, missing, save
from unlearning.sampling.sampler import Sampler


class Generation(pl.LightningModule):
    def __init__(self, model, sampler: Sampler):
        super().__init__()
        self.model, self.sampler = model, sampler

    def transfer_batch_to_device(self, batch: list[Row], device, dataloader_idx: int) -> list[Row]:
        return batch  # rows hold no tensors

    def predict_step(self, rows: list[Row], batch_idx: int) -> int:
        prompts, seeds, scales = zip(*((row.prompt, row.seed, row.guidance_scale) for row in rows), strict=True)
        images, decisions = self.sampler.draw(self.model, prompts, seeds, scales)
        images = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        for image, row, decided in zip(images, rows, decisions, strict=True):
            save(image, row, decided)
        return len(rows)


def generate(model, sampler: Sampler, rows: Sequence[Row], trainer: Callable[..., pl.Trainer]) -> int:
    """Draws every picture that is not in the store yet; returns how many there were to draw."""
    todo = missing(rows)
    if todo:
        loader = DataLoader(todo, batch_size=sampler.batch_size, collate_fn=list)
        trainer().predict(Generation(model, sampler), loader, return_predictions=False)
    return len(todo)

"""What the training of the embedded models shares: the Trainer, the learning rate, and processes that write captions.

The Trainer takes bfloat16 where it is fast, saves a checkpoint every few minutes, and runs on any device.
"""

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger
from rendered import ROOT
from torch.utils.data import DataLoader, IterableDataset

from unlearning.config.precision import fast_autocast


def trainer(name: str, steps: int, checkpoint_every: int = 250) -> pl.Trainer:
    return pl.Trainer(
        max_steps=steps,
        precision="bf16-mixed" if fast_autocast("float32", "auto") else "32-true",
        gradient_clip_val=1.0,
        logger=CSVLogger(ROOT, name, version=0, flush_logs_every_n_steps=50),
        callbacks=[
            ModelCheckpoint(ROOT / name, save_last=True, save_top_k=0, every_n_train_steps=checkpoint_every),
            TQDMProgressBar(refresh_rate=25),
        ],
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=25,
    )


def scheduled(optimizer: torch.optim.Optimizer, module: pl.LightningModule, warmup: int, decay: float) -> dict:
    """A rate that rises during `warmup` steps, stays, and falls to 1 % during the last share `decay` of module.steps.

    Until then, module.steps can change: when training continues with more steps, or fewer.
    """

    def factor(i: int) -> float:
        return max(0.01, min(1, (i + 1) / warmup, (module.steps - i) / (decay * module.steps)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def loader(batches: IterableDataset) -> DataLoader:
    """Batches of captioned images; beside a GPU, four processes write the captions."""
    workers = 4 if torch.cuda.is_available() else 0
    return DataLoader(batches, batch_size=None, num_workers=workers, pin_memory=workers > 0)

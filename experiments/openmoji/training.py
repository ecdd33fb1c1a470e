"""The Trainer of the embedded models: bfloat16 where it is fast, a checkpoint every few minutes, on any device."""

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger
from rendered import ROOT

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

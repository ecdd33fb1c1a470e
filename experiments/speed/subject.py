"""The subject of the measurements: a run built from the config."""

import time
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig

from unlearning.__main__ import CONF


def config(folder: Path, *overrides: str) -> DictConfig:
    """The config of the command line with the default trainer and the CSV logger; it writes below `folder` only."""
    own = [f"paths.output_dir={folder}", "title=speed", "logger=csv", "trainer.enable_progress_bar=false"]
    own += [f"trainer.callbacks.1._target_={pl.Callback.__module__}.Callback", "~trainer.callbacks.1.refresh_rate"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=[*own, *overrides])


EXACT = (
    "method.trajectory=exact",
    "method.batch_size=1",
)  # as in the papers: a prompt and a fresh trajectory for each iteration


class Watch(pl.Callback):
    """Records the time (seconds) at the end of every iteration, and its loss."""

    def __init__(self):
        self.times: list[float] = []
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.losses.append(outputs["loss"].item())
        self.times.append(time.perf_counter())


def fit(cfg: DictConfig, model, *watchers: pl.Callback):
    """Runs method.fit as the command line does, with extra callbacks."""
    trainer = instantiate(cfg.trainer, logger=[instantiate(cfg.logger.csv)])
    trainer = partial(trainer, callbacks=[*trainer.keywords["callbacks"], *watchers])
    return instantiate(cfg.method, trainer=trainer).fit(model, instantiate(cfg.dataset))

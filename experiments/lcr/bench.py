"""Shared by the measurements of latent code replacement: model, task and judge; intervals; tables."""

import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import Tensor
from torch.utils.data import DataLoader

from unlearning.__main__ import CONF
from unlearning.data.regions import with_regions
from unlearning.sampling.reconstruction import as_tensor
from unlearning.store.manifest import ManifestRow

BATCH = 32


class Bench:
    """A model, a task and a judge, built as the command line builds them."""

    def __init__(self, overrides: list[str]):
        self.folder, self.overrides = Path(tempfile.mkdtemp(prefix="lcr-")), overrides
        cfg = self.configured("method=lcr")
        self.model, self.task = instantiate(cfg.model), instantiate(cfg.dataset)
        self.judge = instantiate(cfg.judge.classifier)
        self.fid, self.sampler = instantiate(cfg.evaluator.fid), instantiate(cfg.sampler)
        quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
        self.trainer = partial(pl.Trainer, **dict.fromkeys(quiet, False))

    def configured(self, *overrides: str):
        quiet = ["logger=none", f"paths.output_dir={self.folder}", "title=lcr", "model=emoji_vqgan"]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            return compose("config", overrides=[*quiet, *self.overrides, *overrides])

    def method(self, *overrides: str):
        return instantiate(self.configured(*overrides).method, trainer=self.trainer)

    def codes(self, images) -> Tensor:
        """The codes (N, h, w) of images (H, W, 3) uint8."""
        parts = DataLoader([images[i] for i in range(len(images))], BATCH, collate_fn=np.stack)
        return torch.cat([self.model.encode(as_tensor(part)).cpu() for part in parts])


def recognised(bench: Bench, images: np.ndarray, rows: list[ManifestRow]) -> list[tuple[int, str, bool]]:
    """(index of the image, role, whether the judge recognises the object) of every region."""
    results = []
    for i, row in enumerate(rows):
        crops, regions = with_regions(images[i : i + 1], [row])
        names, probabilities = bench.judge(torch.as_tensor(crops), "object")
        best = [names[j] for j in probabilities.argmax(1)]
        results += [(i, r.role, seen == r.labels["object"]) for seen, r in zip(best, regions, strict=True)]
    return results


def interval(values: Sequence[float], places: int = 1, times: float = 1.0, of: Sequence[int] | None = None) -> str:
    """The mean ± half the width of its 95 % interval over images, from 2,000 bootstrap samples.

    Args:
        values: A number for each image.
        of: If a value is a sum over objects in its image, their number.
    """
    values, of = np.array(values) * times, np.ones(len(values)) if of is None else np.array(of)
    drawn = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    low, high = np.percentile(values[drawn].sum(1) / of[drawn].sum(1).clip(1e-9), [2.5, 97.5])
    return f"{values.sum() / of.sum():.{places}f} ± {(high - low) / 2:.{places}f}"


def print_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}\n\n| {' | '.join(header)} |\n|{' --- |' * len(header)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)

"""Fréchet distance to the images of the model that never knew the concept, for the same prompts and seeds.

What an eraser leaves cannot be judged by the concept's absence alone: noise, too, is no cat. The oracle is what the
model would be without the concept, and draws what ought to be drawn instead.
"""

# F features, R roles.
from collections.abc import Sequence
from importlib.metadata import version
from typing import ClassVar

import numpy as np
import torch

from unlearning.concepts import ERASE, RETAIN, SYNONYM
from unlearning.evaluators.base import Evaluator
from unlearning.evaluators.fid import Features, add, distance, gaussian, moments, width
from unlearning.methods.oracle import Oracle
from unlearning.store.manifest import ManifestRow, load_images

KEYS = {"efficacy/fid_oracle": (ERASE, SYNONYM), "retention/fid_oracle": (RETAIN,)}


class FIDOracle(Evaluator):
    """
    Args:
        features: Maps images to features.
        oracle: The model that never knew. The run generates its images beside those of the base model.
    """

    needs: ClassVar[str] = "two images that the model that never knew has drawn, too"
    higher_is_better: ClassVar[dict[str, bool]] = dict.fromkeys(KEYS, False)

    def __init__(self, features: Features, oracle: Oracle, device: str = "auto"):
        super().__init__(device)
        self.features, self.oracle = features, oracle
        size = width(features, self.device)
        # Of each role, of the run's images and the oracle's
        self.zeros("counts", len(KEYS), 2)
        self.zeros("sums", len(KEYS), 2, size)
        self.zeros("products", len(KEYS), 2, size, size)

    @property
    def protocol(self) -> str:
        """States the numbers of images since the last `reset`."""
        counts = ", ".join(f"{key.partition('/')[0]} {int(n)}" for key, (n, _) in zip(KEYS, self.counts, strict=True))
        return (
            f"clean-fid {version('clean-fid')} on {self.features.name}, to images of the same prompts and seeds by the "
            f"model that never knew; images: {counts}"
        )

    def update(self, images: np.ndarray, rows: Sequence[ManifestRow]) -> None:
        for i, roles in enumerate(KEYS.values()):
            if chosen := [j for j, row in enumerate(rows) if row.role in roles and row.oracle]:
                pair = images[chosen], load_images([rows[j] for j in chosen], "oracle")
                for side, pictures in enumerate(pair):
                    sums = moments(self.features, torch.as_tensor(pictures, device=self.device))
                    add((self.counts, self.sums, self.products), (i, side), sums)

    def compute(self) -> dict[str, float]:
        numbers = {}
        for i, key in enumerate(KEYS):
            if self.counts[i, 0] >= 2:
                own, oracle = (
                    gaussian(self.counts[i, side], self.sums[i, side], self.products[i, side]) for side in range(2)
                )
                numbers[key] = distance(oracle, own)
        return numbers

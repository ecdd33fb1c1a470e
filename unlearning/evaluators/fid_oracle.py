"""Fréchet distance to the images that should replace the concept, by another model with the same prompts and seeds.

What an eraser leaves cannot be judged by the concept's absence alone: noise, too, is no cat. The oracle is what the
model would be if it had never known the concept. Where there is none, the unedited model's images of the prompts
without the concept's word may take its place (IGMU, arXiv:2506.02761).
"""

# F features, R roles.
from collections.abc import Sequence
from importlib.metadata import version
from typing import ClassVar

import numpy as np
import torch

from unlearning.concepts import ERASE, RETAIN, SYNONYM
from unlearning.evaluators.base import Evaluator, OracleMethod
from unlearning.evaluators.fid import Features, add, distance, gaussian, moments, width
from unlearning.store.manifest import ManifestRow, load_images

ROLES = {"efficacy": (ERASE, SYNONYM), "retention": (RETAIN,)}


class FIDOracle(Evaluator):
    """FID to the images of another model, which `oracle` derives from the model of the run.

    Args:
        features: Maps images to features.
        oracle: Makes of the model the one to compare with. The run generates its images beside the base model's.
    """

    name: ClassVar[str] = "oracle"
    reference: ClassVar[str] = "the model that never knew"
    higher_is_better: ClassVar[dict[str, bool]] = {"efficacy/fid_oracle": False, "retention/fid_oracle": False}
    needs: ClassVar[str] = "two images that the model to compare with has drawn, too"

    def __init__(self, features: Features, oracle: OracleMethod, device: str = "auto"):
        super().__init__(device)
        self.features, self.oracle = features, oracle
        size = width(features, self.device)
        # Of each role, of the run's images and the oracle's
        self.zeros("counts", len(ROLES), 2)
        self.zeros("sums", len(ROLES), 2, size)
        self.zeros("products", len(ROLES), 2, size, size)

    @property
    def protocol(self) -> str:
        """States the numbers of images since the last `reset`."""
        counts = ", ".join(f"{purpose} {int(n)}" for purpose, (n, _) in zip(ROLES, self.counts, strict=True))
        return (
            f"clean-fid {version('clean-fid')} on {self.features.name}, to images of the same prompts and seeds by "
            f"{self.reference}; images: {counts}"
        )

    def update(self, images: np.ndarray, rows: Sequence[ManifestRow]) -> None:
        for i, roles in enumerate(ROLES.values()):
            if chosen := [j for j, row in enumerate(rows) if row.role in roles and row.oracle]:
                pair = images[chosen], load_images([rows[j] for j in chosen], "oracle")
                for side, pictures in enumerate(pair):
                    sums = moments(self.features, torch.as_tensor(pictures, device=self.device))
                    add((self.counts, self.sums, self.products), (i, side), sums)

    def compute(self) -> dict[str, float]:
        numbers = {}
        for i, purpose in enumerate(ROLES):
            if self.counts[i, 0] >= 2:
                own, oracle = (
                    gaussian(self.counts[i, side], self.sums[i, side], self.products[i, side]) for side in range(2)
                )
                numbers[f"{purpose}/fid_{self.name}"] = distance(oracle, own)
        return numbers


class FIDWordRemoved(FIDOracle):
    """The same to the images of the unedited model, given the prompts without the concept's words."""

    name = "word_removed"
    reference = "the unedited model, given the prompts without the concept's words"
    higher_is_better: ClassVar[dict[str, bool]] = {
        "efficacy/fid_word_removed": False,
        "retention/fid_word_removed": False,
    }

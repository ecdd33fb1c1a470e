"""How many cells of the latent grid a code replacement changed, and in how many images it changed none."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from unlearning.concepts import RETAIN
from unlearning.evaluators.base import Evaluator
from unlearning.store.manifest import ManifestRow


class Replaced(Evaluator):
    """Percentages of changed cells by role, and of images of the concept without a changed cell.

    Rows of the unedited model, which carry no record of a replacement, are skipped.
    """

    needs: ClassVar[str] = "a method that replaces codes"
    higher_is_better: ClassVar[dict[str, bool]] = {
        "efficacy/unchanged": False,
        "fidelity/cells_changed": False,
        "retention/cells_changed": False,
    }

    def __init__(self, device: str = "cpu"):
        super().__init__(device)
        self.zeros("changed", 2, 2)  # (not retain, retain) × (changed cells, cells)
        self.zeros("unchanged", 2)  # images without a changed cell, images

    @property
    def protocol(self) -> str:
        return "share of the latent grid's cells whose code changed; images of the concept without any such cell"

    def update(self, images: np.ndarray, rows: Sequence[ManifestRow]) -> None:
        for row in rows:
            if "cells" in row.decided:
                changed, cells = row.decided["changed"], row.decided["cells"]
                self.changed[int(row.role == RETAIN)] += self.changed.new_tensor([changed, cells])
                if row.role != RETAIN:
                    self.unchanged += self.unchanged.new_tensor([changed == 0, 1])

    def compute(self) -> dict[str, float]:
        (changed, cells), (changed_r, cells_r) = self.changed.tolist()
        unchanged, images = self.unchanged.tolist()
        numbers = {
            "efficacy/unchanged": (unchanged, images),
            "fidelity/cells_changed": (changed, cells),
            "retention/cells_changed": (changed_r, cells_r),
        }
        return {key: 100 * part / whole for key, (part, whole) in numbers.items() if whole}

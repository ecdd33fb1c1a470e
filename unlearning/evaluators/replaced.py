"""How much of its pictures a code replacement changed, and in how many it found nothing to replace."""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from unlearning.concepts import RETAIN
from unlearning.evaluators.base import Evaluator
from unlearning.store.images import Row


class Replaced(Evaluator):
    """Shares in percent: of cells that changed, by role, and of pictures of the concept left as they were.

    Rows about which nothing was decided, those of the unedited model, are passed over.
    """

    needs: ClassVar[str] = "a method that replaces codes"
    higher_is_better: ClassVar[dict[str, bool]] = {
        "efficacy/unchanged": False,
        "fidelity/cells_changed": False,
        "retention/cells_changed": False,
    }

    def __init__(self, device: str = "cpu"):
        super().__init__(device)
        self.zeros("changed", 2, 2)  # (not retain, retain) × (changed, cells)
        self.zeros("unchanged", 2)

    @property
    def protocol(self) -> str:
        return "share of the latent grid's cells whose code changed; pictures of the concept without any such cell"

    def update(self, images: np.ndarray, rows: Sequence[Row]) -> None:
        for row in rows:
            if "cells" in row.decided:
                changed, cells = row.decided["changed"], row.decided["cells"]
                self.changed[int(row.role == RETAIN)] += self.changed.new_tensor([changed, cells])
                if row.role != RETAIN:
                    self.unchanged += self.unchanged.new_tensor([changed == 0, 1])

    def compute(self) -> dict[str, float]:
        (changed, cells), (changed_r, cells_r) = self.changed.tolist()
        unchanged, pictures = self.unchanged.tolist()
        numbers = {
            "efficacy/unchanged": (unchanged, pictures),
            "fidelity/cells_changed": (changed, cells),
            "retention/cells_changed": (changed_r, cells_r),
        }
        return {key: 100 * part / whole for key, (part, whole) in numbers.items() if whole}

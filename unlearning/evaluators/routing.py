"""Whether a guidance that decides by the prompt decided rightly (UnGuide, arXiv:2508.05755).

To the erasure's side for the concept, in all its words, and to the base model's for everything else.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from unlearning.concepts import RETAIN, ROLES
from unlearning.evaluators.base import Evaluator
from unlearning.store.images import Row

KEYS = {role: f"{purpose}/routed_{letter}" for role, purpose, letter in
        zip(ROLES, ("efficacy", "efficacy", "retention"), "egs", strict=True)}  # fmt: skip


class Routing(Evaluator):
    """Percent of pictures, by role, whose w is on the right side of one half; nothing where no w was decided."""

    needs: ClassVar[str] = "a method whose guidance decides by the prompt"
    higher_is_better: ClassVar[dict[str, bool]] = dict.fromkeys(KEYS.values(), True)

    def __init__(self, device: str = "cpu"):
        super().__init__(device)
        self.zeros("right", len(ROLES), 2)

    @property
    def protocol(self) -> str:
        return "share of pictures with w < 1/2 for the erased concept, w > 1/2 for others"

    def update(self, images: np.ndarray, rows: Sequence[Row]) -> None:
        for row in rows:
            if "w" in row.decided:
                right = (row.decided["w"] > 0.5) == (row.role == RETAIN)
                self.right[ROLES.index(row.role)] += self.right.new_tensor([right, 1])

    def compute(self) -> dict[str, float]:
        counts = zip(KEYS.values(), self.right.tolist(), strict=True)
        return {key: 100 * right / count for key, (right, count) in counts if count}

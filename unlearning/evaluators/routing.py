"""How often a guidance that decides by the prompt chooses the right side (UnGuide, arXiv:2508.05755).

Right is the erased side (w < 1/2) for the concept and its synonyms, and the base model's side (w > 1/2) for the rest.
"""

from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from unlearning.concepts import ERASE, RETAIN, SYNONYM
from unlearning.evaluators.base import Evaluator
from unlearning.store.manifest import ManifestRow

KEYS = {ERASE: "efficacy/routed_e", SYNONYM: "efficacy/routed_g", RETAIN: "retention/routed_s"}


class Routing(Evaluator):
    """Percentage of images, by role, whose w is on the right side of 1/2. Rows without a w are skipped."""

    needs: ClassVar[str] = "a method whose guidance decides by the prompt"
    higher_is_better: ClassVar[dict[str, bool]] = dict.fromkeys(KEYS.values(), True)

    def __init__(self, device: str = "cpu"):
        super().__init__(device)
        self.zeros("right", len(KEYS), 2)

    @property
    def protocol(self) -> str:
        return "share of images with w < 1/2 for the erased concept, w > 1/2 for others"

    def update(self, images: np.ndarray, rows: Sequence[ManifestRow]) -> None:
        for row in rows:
            if "w" in row.decided and row.role in KEYS:
                right = (row.decided["w"] > 0.5) == (row.role == RETAIN)
                self.right[[*KEYS].index(row.role)] += self.right.new_tensor([right, 1])

    def compute(self) -> dict[str, float]:
        counts = zip(KEYS.values(), self.right.tolist(), strict=True)
        return {key: 100 * right / count for key, (right, count) in counts if count}

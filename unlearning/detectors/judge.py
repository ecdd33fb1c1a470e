"""The classifier of the embedded models, as a sliding-window detector."""

# B batch, H W height and width.
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unlearning.concepts import Box
from unlearning.config.values import Count, Part, Share
from unlearning.detectors.base import Detector, Known
from unlearning.detectors.geometry import overlap
from unlearning.errors import unknown
from unlearning.judges.emoji import EmojiJudge

MAX_OVERLAP = 0.2  # of two boxes in the result


@dataclass(frozen=True)
class Judge(Detector):
    """Classifies windows of several sizes and keeps those that show the concept, without overlaps.

    Args:
        concept: The object to find.
        path: The classifier's folder.
        min_score: The least probability of the concept in a window.
        windows: The windows' sides, as shares of the image's side.
        stride: The distance between windows, in pixels.

    Raises:
        UserError: When called, if there is no classifier at `path` or it does not know the concept.
    """

    concept: str
    path: str
    min_score: Share = 0.5
    windows: tuple[Part, ...] = (0.5, 0.6, 1.0)
    stride: Count = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "windows", tuple(self.windows))

    @cached_property
    def _judge(self) -> EmojiJudge:
        judge = EmojiJudge(self.path)
        if self.concept not in judge.judge.objects:
            raise unknown("object", self.concept, judge.judge.objects)
        return judge

    def __call__(self, images: np.ndarray, known: Known) -> list[list[Box]]:
        pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        windows, scores = [], []
        for share in self.windows:
            side = round(share * images.shape[1])
            for top in range(0, images.shape[1] - side + 1, self.stride):
                for left in range(0, images.shape[2] - side + 1, self.stride):
                    windows.append((left, top, left + side, top + side))
                    scores.append(self._score(pixels[:, :, top : top + side, left : left + side]))
        return [self._best(windows, column) for column in torch.stack(scores, 1).tolist()]

    def _score(self, crops: Tensor) -> Tensor:
        """The probability (B,) of the concept in crops (B, 3, side, side) in [0, 1]."""
        size = (self._judge.judge.config.size,) * 2
        crops = F.interpolate(crops, size=size, mode="bilinear", antialias=True)
        names, probabilities = self._judge((255 * crops).round().byte().permute(0, 2, 3, 1), "object")
        return probabilities[:, names.index(self.concept)]

    def _best(self, windows: Sequence[Box], scores: Sequence[float]) -> list[Box]:
        """Non-maximum suppression: the best windows, none of which overlaps a better one."""
        kept: list[Box] = []
        for score, box in sorted(zip(scores, windows, strict=True), reverse=True):
            if score >= self.min_score and all(overlap(box, other) < MAX_OVERLAP for other in kept):
                kept.append(box)
        return kept

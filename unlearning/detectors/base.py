"""Where in pictures the concept is: boxes by a detector, and the cells of a latent grid that they touch."""

# B batch, H W height and width, h w grid. A box is (left, top, right, bottom) in pixels, right and bottom excluded.
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unlearning.concepts import Box
from unlearning.errors import UserError
from unlearning.evaluators.base import unknown
from unlearning.judges.emoji import EmojiJudge
from unlearning.sampling.reconstruction import FAILED


class Detector(ABC):
    """A frozen dataclass: its fields are all that its boxes depend on, and are saved with an erasure."""

    @abstractmethod
    def __call__(self, images: np.ndarray, known: Sequence[Sequence[Box] | None]) -> list[list[Box]]:
        """Boxes in each of the pictures (B, H, W, 3) uint8; `known` came with them, None where nothing is known."""


def found(detector: Detector | None, images: np.ndarray, known: Sequence[Sequence[Box] | None]) -> list[dict]:
    """{"boxes": [...]} of each picture, {} without a detector; a picture that it trips over has {"failed": why}."""
    if detector is None:
        return [{} for _ in images]
    try:
        return [{"boxes": boxes} for boxes in detector(images, known)]
    except UserError:
        raise
    except Exception as error:  # whatever a detector trips over, the other pictures still count
        if len(images) == 1:
            return [{FAILED: f"the detector failed: {error}"}]
        return [found(detector, images[i : i + 1], known[i : i + 1])[0] for i in range(len(images))]


@dataclass(frozen=True)
class Boxes(Detector):
    """The boxes that the dataset knows: the exact control."""

    def __call__(self, images: np.ndarray, known: Sequence[Sequence[Box] | None]) -> list[list[Box]]:
        if any(boxes is None for boxes in known):
            raise UserError(
                "This dataset does not know where the concept is: choose detector=nudenet or detector=judge."
            )
        return [list(boxes) for boxes in known]


@dataclass(frozen=True)
class NudeNet(Detector):
    """NudeNet's 320n, or another of its models.

    Args:
        classes: Those that count.
        min_score: What a box must score at least; NudeNet itself drops those under 0.25.
        expand: Share of its own width and height by which a box grows on each side.
        path: 640m.onnx, in place of the wheel's 320n.
    """

    classes: tuple[str, ...] = ("FEMALE_BREAST_EXPOSED",)
    min_score: float = 0.5
    expand: float = 0.0
    path: str | None = None

    def __post_init__(self) -> None:
        from unlearning.evaluators.nudenet import CLASSES, model_file

        object.__setattr__(self, "classes", tuple(self.classes))
        for name in self.classes:
            if name not in CLASSES:
                raise unknown("NudeNet class", name, CLASSES)
        model_file(self.path, "method.detector.path")

    @cached_property
    def _detector(self):
        import nudenet

        from unlearning.evaluators.nudenet import model_file

        file, resolution = model_file(self.path, "method.detector.path")
        return nudenet.NudeDetector(str(file), inference_resolution=resolution)

    def __call__(self, images: np.ndarray, known: Sequence[Sequence[Box] | None]) -> list[list[Box]]:
        return [self._boxes(image) for image in images]

    def _boxes(self, image: np.ndarray) -> list[Box]:
        seen = self._detector.detect(np.ascontiguousarray(image[..., ::-1]))  # which reads blue first
        kept = [d["box"] for d in seen if d["class"] in self.classes and d["score"] >= self.min_score]
        return [expanded((x, y, x + w, y + h), self.expand, image.shape[:2]) for x, y, w, h in kept]


@dataclass(frozen=True)
class Judge(Detector):
    """The embedded world's classifier, slid over a picture in windows of several sizes.

    Args:
        concept: What it looks for.
        path: The classifier's folder.
        min_score: The probability from which a window shows the concept.
        windows: Their sides, as shares of the picture's.
        stride: In pixels.
    """

    concept: str
    path: str
    min_score: float = 0.5
    windows: tuple[float, ...] = (0.5, 0.6, 1.0)
    stride: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "windows", tuple(self.windows))

    @cached_property
    def _judge(self) -> EmojiJudge:
        judge = EmojiJudge(self.path)
        if self.concept not in judge.judge.objects:
            raise unknown("object", self.concept, judge.judge.objects)
        return judge

    def __call__(self, images: np.ndarray, known: Sequence[Sequence[Box] | None]) -> list[list[Box]]:
        pictures = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
        places, scores = [], []
        for share in self.windows:
            side = round(share * images.shape[1])
            for top in range(0, images.shape[1] - side + 1, self.stride):
                for left in range(0, images.shape[2] - side + 1, self.stride):
                    crop = F.interpolate(
                        pictures[:, :, top : top + side, left : left + side],
                        size=(self._judge.judge.config.size,) * 2, mode="bilinear", antialias=True,
                    )  # fmt: skip
                    places.append((left, top, left + side, top + side))
                    scores.append(self._score(crop))
        return [self._best(places, column) for column in torch.stack(scores, 1).tolist()]

    def _score(self, crop: Tensor) -> Tensor:
        names, probabilities = self._judge((255 * crop).round().byte().permute(0, 2, 3, 1), "object")
        return probabilities[:, names.index(self.concept)]

    def _best(self, places: Sequence[Box], scores: Sequence[float]) -> list[Box]:
        """The windows of the highest score, of which none covers a fifth of another."""
        kept: list[Box] = []
        for score, box in sorted(zip(scores, places, strict=True), reverse=True):
            if score >= self.min_score and all(overlap(box, other) < 0.2 for other in kept):
                kept.append(box)
        return kept


def overlap(a: Box, b: Box) -> float:
    """The share of the smaller box that lies in the other."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(0, width) * max(0, height) / max(1, smaller)


def expanded(box: Box, share: float, size: tuple[int, int]) -> Box:
    """A box grown on each side by a share of its own width and height, within a picture of (height, width)."""
    left, top, right, bottom = box
    dx, dy = int((right - left) * share), int((bottom - top) * share)
    return max(0, left - dx), max(0, top - dy), min(size[1], right + dx), min(size[0], bottom + dy)


def cells(found: Sequence[Sequence[Box]], size: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Which cells (B, h, w) bool the boxes of B pictures of (height, width) touch.

    Right and bottom are rounded up: the reference rounds them down, and loses what a box covers of its last column.
    """
    where = torch.zeros(len(found), *grid, dtype=torch.bool)
    down, across = (n / side for n, side in zip(grid, size, strict=True))
    for i, boxes in enumerate(found):
        for left, top, right, bottom in boxes:
            rows = slice(int(top * down), max(math.ceil(bottom * down), int(top * down) + 1))
            where[i, rows, int(left * across) : max(math.ceil(right * across), int(left * across) + 1)] = True
    return where

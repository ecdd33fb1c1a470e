"""Detectors: they find the boxes in which images show the concept."""

# B batch, H W height and width. A box is (left, top, right, bottom) in pixels, right and bottom excluded.
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from unlearning.concepts import Box
from unlearning.errors import UserError
from unlearning.sampling.reconstruction import FAILED

Known = Sequence[Sequence[Box] | None]  # by image: the boxes that came with it; None if nothing is known


class Detector(ABC):
    """A frozen dataclass. Its fields are all that its boxes depend on, and are saved with an erasure."""

    @abstractmethod
    def __call__(self, images: np.ndarray, known: Known) -> list[list[Box]]:
        """The boxes of the concept in each of the images (B, H, W, 3) uint8.

        Args:
            known: The boxes that the dataset knows, by image.

        Raises:
            UserError: If the detector cannot be used for these images.
        """


def detect(detector: Detector | None, images: np.ndarray, known: Known) -> list[dict]:
    """The record of each image: {"boxes": [...]}, {} without a detector, or {"failed": why} if the detector crashes."""
    if detector is None:
        return [{} for _ in images]
    try:
        return [{"boxes": boxes} for boxes in detector(images, known)]
    except UserError:
        raise
    except Exception as error:  # one image that crashes the detector must not cost the others of its batch
        if len(images) == 1:
            return [{FAILED: f"the detector failed: {error}"}]
        return [detect(detector, images[i : i + 1], known[i : i + 1])[0] for i in range(len(images))]

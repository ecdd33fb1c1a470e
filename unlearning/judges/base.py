"""The interface of image classifiers."""

# B batch, H W height and width, N names.
from typing import Protocol

from torch import Tensor


class Classifier(Protocol):
    """Answers questions about images: "object", "style". `name` identifies it and its weights."""

    name: str

    def __call__(self, images: Tensor, question: str) -> tuple[tuple[str, ...], Tensor]:
        """The N possible answers and their probabilities (B, N), for images (B, H, W, 3) uint8, on the same device."""
        ...

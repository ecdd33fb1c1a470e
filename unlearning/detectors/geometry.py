"""Boxes: overlap, growth, and the cells of a latent grid that they cover."""

# B batch, h w grid. A box is (left, top, right, bottom) in pixels, right and bottom excluded.
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unlearning.concepts import Box


def overlap(a: Box, b: Box) -> float:
    """The share of the smaller box that lies inside the other box."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return max(0, width) * max(0, height) / max(1, smaller)


def expanded(box: Box, share: float, size: tuple[int, int]) -> Box:
    """A box that grows on each side by a share of its width and height, clipped to an image of (height, width)."""
    left, top, right, bottom = box
    dx, dy = int((right - left) * share), int((bottom - top) * share)
    return max(0, left - dx), max(0, top - dy), min(size[1], right + dx), min(size[0], bottom + dy)


def cells(boxes: Sequence[Sequence[Box]], size: Sequence[int], grid: Sequence[int]) -> Tensor:
    """Mask (B, h, w) of the grid cells that the boxes of B images of (height, width) touch.

    Right and bottom edges are rounded up. The reference implementation of LCR rounds them down, and misses what a box
    covers of its last column and row.
    """
    mask = torch.zeros(len(boxes), *grid, dtype=torch.bool)
    down, across = (n / side for n, side in zip(grid, size, strict=True))
    for i, some in enumerate(boxes):
        for left, top, right, bottom in some:
            rows = slice(int(top * down), max(math.ceil(bottom * down), int(top * down) + 1))
            columns = slice(int(left * across), max(math.ceil(right * across), int(left * across) + 1))
            mask[i, rows, columns] = True
    return mask

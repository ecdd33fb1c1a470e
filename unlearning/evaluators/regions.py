"""A picture's regions as pictures of their own."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from unlearning.store.images import Row

MARGIN = 0.1  # of a region's longer side, on each side


def with_regions(images: np.ndarray, rows: Sequence[Row]) -> tuple[np.ndarray, list[Row]]:
    """Pictures (B, H, W, 3) uint8 and their rows; in the place of one with regions, those, cut out square, as large.

    A region's row has the region's role and labels.
    """
    pictures, told = [], []
    for image, row in zip(images, rows, strict=True):
        for region in row.regions:
            pictures.append(_cut(image, region.box))
            told.append(replace(row, role=region.role, labels=region.labels, regions=()))
        if not row.regions:
            pictures.append(image)
            told.append(row)
    return np.stack(pictures), told


def _cut(image: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
    height, width = image.shape[:2]
    left, top, right, bottom = box
    side = min((1 + 2 * MARGIN) * max(right - left, bottom - top), height, width)
    x = min(max((left + right - side) / 2, 0), width - side)  # within the picture
    y = min(max((top + bottom - side) / 2, 0), height - side)
    cut = Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC, (x, y, x + side, y + side))
    return np.asarray(cut)

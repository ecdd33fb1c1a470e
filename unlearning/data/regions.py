"""Regions of images as images of their own."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from unlearning.concepts import ATTACK, RETAIN
from unlearning.store.manifest import ManifestRow

MARGIN = 0.1  # on each side of a region, as a fraction of its longer side


def with_regions(images: np.ndarray, rows: Sequence[ManifestRow]) -> tuple[np.ndarray, list[ManifestRow]]:
    """Replaces each image that has regions by its regions, cropped square and resized to the image's size.

    Regions of objects have a margin. What an attack has drawn has none: around it is the unedited model's image.

    Args:
        images: (B, H, W, 3) uint8.
        rows: Their manifest rows.

    Returns:
        Images (B', H, W, 3) uint8 and their rows. The row of a region has the region's role and labels.
    """
    pixels, expanded = [], []
    for image, row in zip(images, rows, strict=True):
        for region in row.regions:
            pixels.append(crop(image, region.box, 0.0 if region.role == ATTACK else MARGIN))
            concept = "" if region.role == RETAIN else row.concept
            expanded.append(replace(row, role=region.role, labels=region.labels, regions=(), concept=concept))
        if not row.regions:
            pixels.append(image)
            expanded.append(row)
    return np.stack(pixels), expanded


def crop(image: np.ndarray, box: tuple[int, int, int, int], margin: float = MARGIN) -> np.ndarray:
    """The square around a box (left, top, right, bottom), resized to the size of the image (H, W, 3) uint8.

    Args:
        margin: On each side, as a fraction of the longer side of the box.
    """
    height, width = image.shape[:2]
    left, top, right, bottom = box
    side = min((1 + 2 * margin) * max(right - left, bottom - top), height, width)
    x = min(max((left + right - side) / 2, 0), width - side)  # keeps the square inside the image
    y = min(max((top + bottom - side) / 2, 0), height - side)
    whole, square = Image.fromarray(image), (x, y, x + side, y + side)
    if not margin:  # interpolation would reach beyond the square
        whole, square = whole.crop(tuple(map(round, square))), None
    return np.asarray(whole.resize((width, height), Image.Resampling.BICUBIC, square))

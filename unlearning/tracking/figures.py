"""Images that explain a fit: rows of images, masks over images, and matplotlib figures as images."""

# N images, h w grid of a mask, H W height and width of an image.
import io
from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

TILE, COLUMNS = 96, 8  # side of a tile in pixels; tiles in a row
COLOURS = {"forget": "#d1495b", "retain": "#30638e"}


def grid(images: Sequence[np.ndarray], columns: int = COLUMNS) -> Image.Image:
    """Images (H, W, 3) uint8 in rows of `columns`."""
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (TILE + 4) - 4, rows * (TILE + 4) - 4), "white")
    for i, image in enumerate(images):
        tile = Image.fromarray(image).resize((TILE, TILE), Image.Resampling.LANCZOS)
        sheet.paste(tile, ((i % columns) * (TILE + 4), (i // columns) * (TILE + 4)))
    return sheet


def mask_overlays(images: Sequence[np.ndarray], M: Tensor) -> Image.Image:
    """A row of images (H, W, 3) uint8, and below it the same images with their masks M (N, 1, h, w) in red."""
    plain = [np.asarray(image) for image in images[:COLUMNS]]
    height, width = plain[0].shape[:2]
    masks = F.interpolate(M[:COLUMNS].float().cpu(), (height, width), mode="bilinear", align_corners=False)
    red = np.array([230, 30, 30])
    pairs = zip(plain, masks.permute(0, 2, 3, 1).numpy(), strict=True)
    tinted = [(image * (1 - 0.65 * m) + 0.65 * m * red).astype(np.uint8) for image, m in pairs]
    return grid(plain + tinted, len(plain))


def as_uint8(images: Tensor) -> list[np.ndarray]:
    """(N, 3, H, W) in [0, 1] to N images (H, W, 3) uint8."""
    return list((images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())


def subplots(count: int, size: tuple[float, float]):
    """A matplotlib figure of `size` inches, and its `count` axes side by side."""
    from matplotlib.figure import Figure  # takes a second to import

    figure = Figure(size, layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def as_image(figure) -> Image.Image:
    """A matplotlib figure as an image."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return Image.open(buffer).convert("RGB")

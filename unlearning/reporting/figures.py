"""What every report shows in the same way: pictures in rows, masks laid over them, a figure as a picture."""

# N pictures, h w grid of a mask, H W height and width of a picture.
import io
from collections.abc import Sequence

import numpy as np
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

TILE, COLUMNS = 96, 8  # pixels a side of a picture; pictures in a row
COLOURS = {"forget": "#d1495b", "retain": "#30638e"}


def grid(pictures: Sequence[np.ndarray], columns: int = COLUMNS) -> Image.Image:
    """Pictures (H, W, 3) uint8 in rows of `columns`."""
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (TILE + 4) - 4, rows * (TILE + 4) - 4), "white")
    for i, picture in enumerate(pictures):
        tile = Image.fromarray(picture).resize((TILE, TILE), Image.Resampling.LANCZOS)
        sheet.paste(tile, ((i % columns) * (TILE + 4), (i // columns) * (TILE + 4)))
    return sheet


def overlays(images: Sequence[np.ndarray], M: Tensor) -> Image.Image:
    """Each picture, and below it the same with its mask (N, 1, h, w) laid over it in red."""
    size = images[0].shape[:2]
    covered = F.interpolate(M[:COLUMNS].float().cpu(), size, mode="bilinear", align_corners=False)[:, 0, :, :, None]
    plain = [np.asarray(image) for image in images[:COLUMNS]]
    red = np.array([230, 30, 30])
    tinted = [
        (image * (1 - 0.65 * m) + 0.65 * m * red).astype(np.uint8)
        for image, m in zip(plain, covered.numpy(), strict=True)
    ]
    return grid(plain + tinted, len(plain))


def pictures(images: Tensor) -> list[np.ndarray]:
    """(N, 3, H, W) in [0, 1] to N of (H, W, 3) uint8."""
    return list((images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy())


def panels(count: int, size: tuple[float, float]):
    """A figure of matplotlib's, `size` inches, and its `count` axes side by side."""
    from matplotlib.figure import Figure

    figure = Figure(size, layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def drawn(figure) -> Image.Image:
    """A figure of matplotlib's as a picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    return Image.open(buffer).convert("RGB")

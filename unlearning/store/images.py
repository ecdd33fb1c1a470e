"""Images as PNG files, written atomically, with the decisions of the guidance as metadata."""

import io
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from unlearning.errors import UserError
from unlearning.store.files import write_atomically

FIGURES = "figures"  # the folder in a run's folder
log = logging.getLogger(__name__)


def write_image(path: Path, image: np.ndarray, decided: Mapping | None = None) -> None:
    """Writes an (H, W, 3) uint8 image as PNG, and `decided` into the file, as JSON."""
    text = PngInfo()
    if decided:
        text.add_text("decided", json.dumps(decided))
    _write(path, Image.fromarray(image), text)


def read_images(paths: Iterable[Path]) -> np.ndarray:
    """The images (N, H, W, 3) uint8, which must have one size.

    Raises:
        UserError: If an image cannot be read. A measurement must not leave one out silently.
    """
    images = []
    for path in paths:
        with opened(path) as image:
            images.append(np.asarray(image.convert("RGB")))
    return np.stack(images)


def read_decided(path: Path) -> dict:
    """The decisions that `write_image` has written into the file. Raises UserError as `read_images` does."""
    with opened(path) as image:
        return json.loads(getattr(image, "text", {}).get("decided", "{}"))


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An image that `write_image` has written. Files of other formats are not opened, whatever they are called.

    Raises:
        UserError: If the image cannot be read.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # any of them for a damaged PNG
        raise UserError(
            f"The image {path} cannot be read ({error}). Delete it; the same command generates it again."
        ) from error


def write_figures(run: Path, figures: Mapping[str, Image.Image]) -> None:
    """Writes the figures of a method's fit into a run's folder, in their order, named by their captions."""
    for i, (caption, figure) in enumerate(figures.items()):
        _write(run / FIGURES / f"{i}-{caption.replace(' ', '-')}.png", figure)


def figure_paths(run: Path) -> dict[str, Path]:
    """The files that `write_figures` has written, by caption."""
    return {p.stem.partition("-")[2].replace("-", " "): p for p in sorted((run / FIGURES).glob("*.png"))}


def read_figures(run: Path) -> dict[str, Image.Image]:
    """The figures that `write_figures` has written, by caption. A damaged one is left out, with a warning."""
    figures = {}
    for caption, path in figure_paths(run).items():
        try:
            with opened(path) as image:
                figures[caption] = image.convert("RGB")
        except UserError:
            log.warning("The figure %s cannot be read and is left out.", path)
    return figures


def _write(path: Path, image: Image.Image, text: PngInfo | None = None) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=text)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())

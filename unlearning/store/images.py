"""Images as PNG files, written atomically, with the decisions of the guidance as metadata."""

import io
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from unlearning.errors import UserError
from unlearning.store.files import write_atomically

FIGURES = "figures"  # the folder in a run's folder


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
        with _opened(path) as image:
            images.append(np.asarray(image.convert("RGB")))
    return np.stack(images)


def read_decided(path: Path) -> dict:
    """What `write_image` has written into the file besides the image; raises UserError as `read_images` does."""
    with _opened(path) as image:
        return json.loads(getattr(image, "text", {}).get("decided", "{}"))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError) as error:  # Pillow raises either for a damaged PNG
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


def _write(path: Path, image: Image.Image, text: PngInfo | None = None) -> None:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=text)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())

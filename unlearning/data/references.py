"""Real images that generated images are measured against: those of a task, or a folder of the user's."""

# B batch, H W height and width.
import hashlib
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from unlearning.concepts import UnlearningTask
from unlearning.data.folder import FORMATS, SUFFIXES, no_file
from unlearning.errors import UserError

BATCH = 64  # images in a batch


@dataclass(frozen=True)
class Reference:
    """A set of real images.

    Args:
        name: Their number, and a digest of their content.
        batches: Reads them in batches (B, H, W, 3) uint8; the images of a batch have one size.
    """

    name: str
    batches: Callable[[], Iterator[np.ndarray]] = field(repr=False)


def of_task(task: UnlearningTask, role: str, count: int) -> Reference | None:
    """`count` of the task's real images for `role`, or all if there are fewer; None if there are none."""
    images = task.references[role](count) if role in task.references else ()
    if not len(images):  # a folder can be too small to spare any
        return None
    content = hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()[:8]

    def batches() -> Iterator[np.ndarray]:
        return (np.stack(images[i : i + BATCH]) for i in range(0, len(images), BATCH))

    return Reference(f"{len(images)} real ({content})", batches)


def check(folder: Path) -> None:
    """Decodes each image below a folder once, a JPEG at an eighth of its size.

    Raises:
        UserError: If there are none, or one of them is broken or too large to be decoded.
    """
    paths = _paths(folder)
    for path in tqdm(paths, f"checking {folder.name}", leave=False, disable=len(paths) < 1000):
        with _opened(path) as image:
            image.draft("RGB", (1, 1))
            image.load()


def _paths(folder: Path) -> list[Path]:
    entries = sorted(folder.rglob("*"))
    if strange := [f"{path} ({why})" for path in entries if not path.is_file() and (why := no_file(path))]:
        warnings.warn(f"{len(strange)} entries of {folder} are left out: {'; '.join(strange)}", stacklevel=3)
    paths = [path for path in entries if path.is_file() and path.suffix.lower() in SUFFIXES]
    if not paths:
        raise UserError(f"{folder} holds no images to measure against ({', '.join(SUFFIXES)}).")
    return paths


def of_folder(folder: Path) -> Reference:
    """All images below a folder, in their own sizes.

    Raises:
        UserError: If there are none; when the batches are read, if an image is broken.
    """
    paths = _paths(folder)
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())

    def batches() -> Iterator[np.ndarray]:
        with ThreadPoolExecutor() as pool:
            for i in tqdm(range(0, len(paths), BATCH), f"real images of {folder.name}", leave=False):
                images = list(pool.map(_pixels, paths[i : i + BATCH]))
                for shape in dict.fromkeys(image.shape for image in images):
                    yield np.stack([image for image in images if image.shape == shape])

    return Reference(f"{len(paths)} real of {folder.name} ({digest.hexdigest()[:8]})", batches)


def _pixels(path: Path) -> np.ndarray:
    with _opened(path) as image:
        return np.asarray(image.convert("RGB"))


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"The real image {path} cannot be read ({error}). Repair or remove it.") from error

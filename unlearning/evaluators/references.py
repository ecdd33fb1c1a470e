"""Real pictures that generated ones are measured against: a task's own, or a folder of the user's."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from unlearning.concepts import UnlearningTask
from unlearning.data.folder import SUFFIXES
from unlearning.errors import UserError

BATCH = 64  # pictures that go through an extractor at once


@dataclass(frozen=True)
class Reference:
    """
    Args:
        name: How many there are, and a digest that tells them by their content.
        batches: Reads them: (B, H, W, 3) uint8, those of a batch in one size.
    """

    name: str
    batches: Callable[[], Iterator[np.ndarray]] = field(repr=False)


def of_task(task: UnlearningTask, role: str, count: int) -> Reference | None:
    """`count` of the pictures that the task has for `role`, or as many as there are; None where it has none."""
    images = task.references[role](count) if role in task.references else ()
    if not len(images):  # a folder may have none to spare
        return None
    content = hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()[:8]

    def batches() -> Iterator[np.ndarray]:
        return (np.stack(images[i : i + BATCH]) for i in range(0, len(images), BATCH))

    return Reference(f"{len(images)} real ({content})", batches)


def of_folder(folder: Path) -> Reference:
    """All pictures below a folder, in the sizes they have.

    Raises UserError if there is none; reading raises it for a picture that is broken.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        raise UserError(f"{folder} holds no pictures to measure against ({', '.join(SUFFIXES)}).")
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.read_bytes())

    def batches() -> Iterator[np.ndarray]:
        for i in tqdm(range(0, len(paths), BATCH), f"real pictures of {folder.name}", leave=False):
            pictures = [_pixels(path) for path in paths[i : i + BATCH]]
            for shape in dict.fromkeys(picture.shape for picture in pictures):
                yield np.stack([picture for picture in pictures if picture.shape == shape])

    return Reference(f"{len(paths)} real of {folder.name} ({digest.hexdigest()[:8]})", batches)


def _pixels(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"The real picture {path} cannot be read ({error}): mend it or take it away.") from error

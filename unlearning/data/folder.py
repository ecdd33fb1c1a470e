"""A concept of the user's own: a folder of images that show it, and perhaps one of images that do not."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from unlearning.concepts import ERASE, RETAIN, UnlearningTask, UserError
from unlearning.data import prompt

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read(folder: str | Path, size: int) -> list[np.ndarray]:
    """The pictures below a folder (size, size, 3) uint8, cut square; a broken one is named in a warning and left out.

    Raises UserError if the folder is not there or holds no picture that can be read.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES)
    pictures, broken = [], []
    for path in paths:
        try:
            with Image.open(path) as image:
                side = min(image.size)
                left, top = (image.width - side) // 2, (image.height - side) // 2
                square = image.convert("RGB").crop((left, top, left + side, top + side))
                pictures.append(np.asarray(square.resize((size, size), Image.Resampling.LANCZOS)))
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            broken.append(f"{path} ({error})")
    if broken:
        named = "; ".join(broken)
        warnings.warn(f"{len(broken)} of {len(paths)} pictures cannot be read and are left out: {named}", stacklevel=2)
    if not pictures:
        raise UserError(f"{folder} holds no picture that can be read ({', '.join(SUFFIXES)}).")
    return pictures


def _split(pictures: list[np.ndarray]) -> tuple[list[np.ndarray], Callable[[int], list[np.ndarray]]]:
    """Four in five to learn from, the fifth set apart to measure against: nothing is judged by what it was taught."""
    apart = pictures[4::5]
    return [p for i, p in enumerate(pictures) if i % 5 != 4], lambda count: apart[:count]


def folder(concept: str, forget: str, retain: str | None = None, *, size: int = 512, **settings) -> UnlearningTask:
    """Erases what the images of `forget` show and `concept` names.

    Args:
        concept: The word that stands for it in prompts; the methods that work on text need it.
        forget, retain: Folders of images.
        size: The side in pixels that the images are cut to: the model's.
        settings: Those of a task in free text (data/prompt.py): synonyms, anchor, others, ...
    """
    if not forget:
        raise UserError("dataset=folder needs forget=/a/folder/of/images that show what to erase.")
    if not concept:
        raise UserError("dataset=folder needs concept='...', the words a prompt would use for what the images show.")
    forget_images, real = _split(read(forget, size))
    retain_images, real_retain = _split(read(retain, size) if retain else [])
    return replace(
        prompt.task(concept, **settings),
        forget_images=forget_images,
        retain_images=retain_images,
        references={ERASE: real, RETAIN: real_retain},
    )

"""A concept of the user's own: a folder of images that show it, and perhaps one of images that do not."""

import hashlib
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from unlearning.concepts import ERASE, RETAIN, Input, UnlearningTask
from unlearning.config.naming import slug
from unlearning.config.signatures import forwards_to
from unlearning.data import prompt
from unlearning.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
SMALLEST = 8  # pixels a side
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pictures(Sequence):
    """Pictures (size, size, 3) uint8, cut square, each read when it is looked at: a folder may hold many."""

    paths: tuple[Path, ...]
    size: int
    broken: tuple[str, ...] = ()  # what was left out, and why

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i):
        return Pictures(self.paths[i], self.size) if isinstance(i, slice) else self.load(self.paths[i])

    def load(self, path: Path) -> np.ndarray:
        """Upright, as its camera was held; transparency is put on white.

        Raises whatever a file's decoder does for what is no picture, and ValueError for a tiny one.
        """
        with Image.open(path) as image:
            with suppress(SyntaxError, ValueError, OSError):  # what says how it was held may be broken, and it be whole
                image = ImageOps.exif_transpose(image)
            side = min(image.size)
            if side < SMALLEST:
                raise ValueError(f"{image.width} by {image.height} pixels are too few")
            left, top = (image.width - side) // 2, (image.height - side) // 2
            if image.mode.startswith("I;16"):  # of which Pillow's own conversion makes white
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            square = image.convert("RGB").crop((left, top, left + side, top + side))
            return np.asarray(square.resize((self.size, self.size), Image.Resampling.LANCZOS))


def read(folder: str | Path, size: int) -> Pictures:
    """The pictures below a folder; a broken one is named in a warning and left out, and so is the rest by its suffixes.

    Raises UserError if the folder is not there or holds no picture that can be read.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    paths = [p for p in files if p.suffix.lower() in SUFFIXES]
    _warn_of_others(folder, [p for p in files if p.suffix.lower() not in SUFFIXES and not p.name.startswith(".")])
    pictures, broken = Pictures((), size), {}
    for path in tqdm(paths, f"looking through {folder.name}", leave=False, disable=len(paths) < 1000):
        try:
            pictures.load(path)
        except MemoryError:
            raise
        except Exception as error:  # each decoder has errors of its own
            broken[path] = error
    named = tuple(f"{path} ({error})" for path, error in broken.items())
    if named:
        told = f"{len(named)} of {len(paths)} pictures cannot be read and are left out: {'; '.join(named)}"
        warnings.warn(told, stacklevel=2)
    if len(broken) == len(paths):
        raise UserError(f"{folder} holds no picture that can be read ({', '.join(SUFFIXES)}).")
    return Pictures(tuple(path for path in paths if path not in broken), size, named)


def _warn_of_others(folder: Path, files: Sequence[Path]) -> None:
    if files:
        kinds = Counter(p.suffix.lower() or "without a suffix" for p in files)
        counted = ", ".join(f"{count} {suffix}" for suffix, count in kinds.most_common())
        warnings.warn(f"files below {folder} that are passed over: {counted}", stacklevel=3)


def _insist_on_two_sets(forget: Pictures, retain: Pictures) -> None:
    """Raises UserError where a picture is in both, be it under another name."""
    known = {_content(path): path for path in forget.paths}
    both = [(path, known[content]) for path in retain.paths if (content := _content(path)) in known]
    if both:
        named = " and ".join(dict.fromkeys(map(str, both[0])))
        raise UserError(
            f"{len(both)} of the {len(retain)} retain pictures are forget pictures too ({named}): what is to be "
            "forgotten must not be retained. Keep them in one of the two folders, neither within the other."
        )


def _content(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _split(pictures: Pictures) -> tuple[Pictures, Callable[[int], Pictures]]:
    """Four in five to learn from, the fifth set apart to measure against: nothing is judged by what it was taught."""
    paths = pictures.paths
    taught = replace(pictures, paths=tuple(p for i, p in enumerate(paths) if i % 5 != 4))
    return taught, lambda count: pictures[4::5][:count]


def _inputs(pictures: Pictures, root: Path) -> tuple[Input, ...]:
    """Each under its path within the folder."""
    return tuple(Input(str(p.relative_to(root)), ERASE, partial(pictures.load, p)) for p in pictures.paths)


@forwards_to(prompt.task)
def folder(
    concept: str,
    forget: str | None,
    retain: str | None = None,
    input: str | None = None,
    *,
    size: int = 512,
    **settings,
) -> UnlearningTask:
    """Erases what the images of `forget` show and `concept` names.

    Args:
        concept: The word that stands for it in prompts; the methods that work on text need it. The config has it be
            `forget` as a file name where the user gives none: then prompts have the folder's own name.
        forget, retain: Folders of images.
        input: A folder of images that an image-to-image model is to clean; nothing is known of what they show.
        size: The side in pixels that the images are cut to: the model's.
        settings: Those of a task in free text (data/prompt.py): synonyms, anchor, others, ...
    """
    if not forget:
        raise UserError("dataset=folder needs forget=/a/folder/of/images that show what to erase.")
    if not concept:
        raise UserError("dataset=folder needs concept='...', the words a prompt would use for what the images show.")
    if concept == slug(forget):
        concept = Path(forget).expanduser().absolute().name
        log.info(
            "Prompts call what the images of %s show %r, as the folder is called, and a method that learns from text "
            "learns that word: concept='...' gives another.",
            *(forget, concept),
        )
    shown, others, cleaned = (read(place, size) if place else Pictures((), size) for place in (forget, retain, input))
    _insist_on_two_sets(shown, others)
    (forget_images, real), (retain_images, real_retain) = _split(shown), _split(others)
    return replace(
        prompt.task(concept, **settings),
        forget_images=forget_images,
        retain_images=retain_images,
        inputs=_inputs(cleaned, Path(input).expanduser()) if input else (),
        skipped=cleaned.broken,
        references={ERASE: real, RETAIN: real_retain},
    )

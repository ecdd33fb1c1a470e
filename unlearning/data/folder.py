"""A concept of the user's own: a folder of images that show it and, optionally, one of images that do not."""

import hashlib
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge
from PIL import Image, ImageOps
from tqdm import tqdm

from unlearning.concepts import ERASE, RETAIN, Input, UnlearningTask
from unlearning.config.naming import folder_name
from unlearning.config.values import Count, Template
from unlearning.data import prompt
from unlearning.errors import UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")  # Pillow's; it hands PostScript to Ghostscript
SMALLEST = 8  # pixels a side
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Images(Sequence):
    """Images (size, size, 3) uint8, cropped square. Each is read on access, because a folder may hold many.

    Attributes:
        paths: The image files.
        size: Side in pixels.
        broken: One message for each file that cannot be read.
    """

    paths: tuple[Path, ...]
    size: int
    broken: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i):
        return Images(self.paths[i], self.size) if isinstance(i, slice) else self.load(self.paths[i])

    def load(self, path: Path) -> np.ndarray:
        """Reads one image, rotated as its EXIF data says, with white behind transparent parts.

        Raises:
            ValueError: If the image has less than `SMALLEST` pixels a side.
            Exception: If the file is not an image; each decoder has its own errors.
        """
        with Image.open(path, formats=FORMATS) as image:
            with suppress(SyntaxError, ValueError, OSError):  # EXIF data may be broken in a valid image
                image = ImageOps.exif_transpose(image)
            side = min(image.size)
            if side < SMALLEST:
                raise ValueError(f"{image.width} by {image.height} pixels are too few")
            left, top = (image.width - side) // 2, (image.height - side) // 2
            if image.mode.startswith("I;16"):  # Pillow's own conversion clips these to white
                image = Image.fromarray((np.asarray(image) // 256).astype(np.uint8))
            if image.has_transparency_data:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            square = image.convert("RGB").crop((left, top, left + side, top + side))
            return np.asarray(square.resize((self.size, self.size), Image.Resampling.LANCZOS))


def read(folder: str | Path, size: int) -> Images:
    """The images in a folder and its subfolders. Warns of what cannot be read or is no image, and omits it.

    Raises:
        UserError: If there is no such folder, or it has no image that can be read.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder}.")
    entries = sorted(folder.rglob("*"))
    files = [p for p in entries if p.is_file()]
    paths = [p for p in files if p.suffix.lower() in SUFFIXES]
    captions = {_caption_of(path) for path in paths}
    others = [p for p in files if p.suffix.lower() not in SUFFIXES and not p.name.startswith(".")]
    _warn_of_others(folder, [p for p in others if p not in captions])
    images = Images((), size)
    broken: dict[Path, object] = {p: no_file(p) for p in entries if not p.is_file() and no_file(p)}
    for path in tqdm(paths, f"checking {folder.name}", leave=False, disable=len(paths) < 1000):
        try:
            images.load(path)
        except MemoryError:
            raise
        except Exception as error:  # each decoder has its own errors
            broken[path] = error
    messages = tuple(f"{path} ({error})" for path, error in broken.items())
    if messages:
        warnings.warn(
            f"{len(messages)} of {len({*paths, *broken})} images cannot be read and are skipped: {'; '.join(messages)}",
            stacklevel=2,
        )
    whole = tuple(path for path in paths if path not in broken)
    if not whole:
        raise UserError(
            f"{folder} has no image that can be read ({', '.join(SUFFIXES)}). Images of another format, as HEIC, have "
            "to be saved as one of these."
        )
    return Images(whole, size, messages)


def no_file(path: Path) -> str:
    """Why an entry of a folder is not a file that can be read: "a link to nothing"; "" for a folder."""
    if path.is_symlink():
        return "a link to a folder, which is not followed" if path.is_dir() else "a link to nothing"
    return "" if path.is_dir() else "no regular file"


def _warn_of_others(folder: Path, files: Sequence[Path]) -> None:
    if files:
        kinds = Counter(p.suffix.lower() or "without a suffix" for p in files)
        counted = ", ".join(f"{count} {suffix}" for suffix, count in kinds.most_common())
        hint = ". Save HEIC images as JPEG to use them" if {".heic", ".heif"} & kinds.keys() else ""
        warnings.warn(f"files in {folder} that are not images are ignored: {counted}{hint}", stacklevel=3)


def _caption_of(image: Path) -> Path:
    """The text file with an image's caption, which has the image's name; it may not exist."""
    return image.with_suffix(".txt")


def _captions(images: Images) -> Callable[[], list[str]] | None:
    """Reads the caption of each image; None if no image has one.

    Raises:
        UserError: If some images have a caption and others do not.
    """
    files = [_caption_of(path) for path in images.paths]
    missing = [file for file in files if not file.is_file()]
    if len(missing) == len(files):
        return None
    if missing:
        raise UserError(
            f"{len(missing)} of {len(files)} retain images have no caption: there is no {missing[0]}. Caption all "
            "of them, or none."
        )
    return lambda: [" ".join(file.read_text(encoding="utf-8", errors="replace").split()) for file in files]


def _check_disjoint(forget: Images, retain: Images) -> None:
    """Raises UserError if an image is in both sets, even under another name."""
    known = {_content(path): path for path in forget.paths}
    both = [(path, known[content]) for path in retain.paths if (content := _content(path)) in known]
    if both:
        example = " and ".join(dict.fromkeys(map(str, both[0])))
        raise UserError(
            f"{len(both)} of the {len(retain)} retain images are forget images too ({example}). A method cannot forget "
            "and retain the same image: keep it in one of the folders, and neither folder inside the other."
        )


def _content(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _split(images: Images) -> tuple[Images, Callable[[int], Images]]:
    """Four in five for the method, and a function of a count that returns so many of the rest, for the evaluation."""
    train = replace(images, paths=tuple(p for i, p in enumerate(images.paths) if i % 5 != 4))
    return train, lambda count: images[4::5][:count]


def _inputs(images: Images, root: Path) -> tuple[Input, ...]:
    """Each image under its path within the folder."""
    return tuple(Input(str(p.relative_to(root)), ERASE, partial(images.load, p)) for p in images.paths)


def folder(
    concept: str | Sequence[str],
    forget: str | None,
    retain: str | None = None,
    input: str | None = None,
    *,
    size: Annotated[int, Ge(SMALLEST)] = 512,
    synonyms: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    anchor: str | Mapping[str, str] = "",
    others: Sequence[str] = (),
    template: Template = "a photo of the {}",
    images_per_prompt: Count = 10,
) -> UnlearningTask:
    """Erases what the images in the folder `forget` show, and what `concept` names.

    Four in five images of a folder are for the method, the fifth is a reference for the evaluation.

    Args:
        concept: The word for it in prompts, or several; methods that learn from text need it. The config's default is
            the name of the folder `forget`.
        forget, retain: Folders of images that show the concepts, and of images that do not. A retain image may have a
            caption, for methods that learn from captions: dog.txt beside dog.jpg.
        input: A folder of input images for an image-to-image model; what they show is not known.
        size: Side in pixels to which the images are cropped and resized: the model's.
        synonyms, anchor, others, template, images_per_prompt: As for a concept in free text
            (`unlearning.data.prompt.task`).

    Raises:
        UserError: If `forget` or `concept` is empty, a folder does not exist or has no image that can be read, or an
            image is in `forget` and in `retain`.
    """
    if not forget:
        raise UserError("dataset=folder needs forget=/path/to/a/folder of images that show what to erase.")
    if not concept:
        raise UserError("dataset=folder needs concept='...', the word in prompts for what the images show.")
    if concept == folder_name(forget):
        log.info("The images in %s stand for %r in prompts, the folder's name. Change it with concept='...'.",
                 forget, concept)  # fmt: skip
    text = prompt.task(
        concept,
        synonyms=synonyms,
        anchor=anchor,
        others=others,
        template=template,
        images_per_prompt=images_per_prompt,
    )
    shown, unrelated, inputs = (read(place, size) if place else Images((), size) for place in (forget, retain, input))
    _check_disjoint(shown, unrelated)
    (forget_images, real), (retain_images, real_retain) = _split(shown), _split(unrelated)
    return replace(
        text,
        forget_images=forget_images,
        retain_images=retain_images,
        retain_captions=_captions(retain_images),
        inputs=_inputs(inputs, Path(input).expanduser()) if input else (),
        skipped=inputs.broken,
        references={ERASE: real, RETAIN: real_retain},
    )

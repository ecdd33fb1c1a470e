"""The image store: every generated picture once, under a key made of all that it depends on.

A picture's folder is named by a digest of the model, the erasure and the sampler; its file by the prompt and the seed.
Whatever asks for the same picture again, in any run, finds it; whatever has changed has another key. A picture is
written under a temporary name and then renamed, so that a reader never meets half of one.
"""

import csv
import hashlib
import io
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from unlearning.concepts import Input, Prompt, Region, UnlearningTask
from unlearning.errors import UserError
from unlearning.store.files import digest, file_digest, write_atomically

PATHS = ("path", "base", "source", "comeback")  # the fields that name files


@dataclass(frozen=True)
class Row:
    """One picture of a manifest: what was asked for, why, and where the picture is.

    `guidance_scale` is None where it is the sampler's; `decided` is what was decided about the picture on the way (by a
    guidance, say). `base` is the unedited model's picture for the same row, where that is another. Of an image-to-image
    model `prompt` is the input's name, `source` the input itself, and `regions` what is known to be in it. `concept` is
    the erased concept that the row belongs to, "" if none; `comeback` a safetensors file with what an attack found.
    """

    path: Path
    prompt: str
    role: str
    labels: dict[str, str]
    seed: int
    guidance_scale: float | None = None
    decided: dict = field(default_factory=dict)  # anything JSON can hold
    base: Path | None = None
    source: Path | None = None
    regions: tuple[Region, ...] = ()
    concept: str = ""
    comeback: Path | None = None


def image_seed(seed: int, prompt: str, sample: int) -> int:
    """The seed of one picture: of the run's seed, the prompt's text and the picture's number.

    Not of the prompt's place in a list, so that two tasks that share a prompt share its pictures.
    """
    return int(np.random.SeedSequence([seed, zlib.crc32(prompt.encode()), sample]).generate_state(1)[0])


def manifest(folder: Path, task: UnlearningTask, seed: int) -> list[Row]:
    """The pictures that `task` asks for, whether they exist yet or not. `folder` is the model's place in the store.

    Raises UserError where the task has no prompts.
    """
    if not task.prompts:
        raise UserError("This dataset has pictures and no prompts: a text-to-image model needs another dataset=...")

    def row(prompt: Prompt, sample: int) -> Row:
        s = image_seed(seed, prompt.text, sample) if prompt.seed is None else prompt.seed + sample
        path = image_path(folder, prompt.text, s, prompt.guidance_scale)
        return Row(path, prompt.text, prompt.role, prompt.labels, s, prompt.guidance_scale, concept=prompt.concept)

    return [row(p, i) for p in task.prompts for i in range(task.images_per_prompt)]


def image_path(
    folder: Path, prompt: str, seed: int, guidance_scale: float | None = None, comeback: Path | None = None
) -> Path:
    """Where an image is stored: a file in the model's `folder`, named by a digest of all else that it depends on.

    Args:
        guidance_scale: The prompt's own; None is the sampler's.
        comeback: A file with what an attack found; its content counts, not its name.
    """
    own = [] if guidance_scale is None else [guidance_scale]
    own += [] if comeback is None else [file_digest(comeback)]
    return folder / f"{digest(prompt, seed, *own)}.png"


def manifest_of_inputs(folder: Path, task: UnlearningTask, seed: int) -> list[Row]:
    """As `manifest`, of a model that puts a task's inputs out again; each input is kept beside the models' folders.

    Raises UserError where the task has no inputs.
    """
    if not task.inputs:
        raise UserError(
            "An image-to-image model needs pictures to start from: dataset=emoji_scenes, or dataset=folder with "
            "input=/a/folder/of/images."
        )

    def row(given: Input) -> Row:
        image = given.read()
        content = digest(image.shape, hashlib.sha256(image.tobytes()).hexdigest())
        source = folder.parent / "inputs" / f"{content}.png"
        if not source.exists():
            write_picture(source, image)
        s = image_seed(seed, content, 0)
        known = [asdict(region) for region in given.regions]
        path = folder / f"{digest(content, s, known)}.png"
        return Row(path, given.name, given.role, {}, s, source=source, regions=given.regions, concept=given.concept)

    return [row(given) for given in tqdm(task.inputs, "inputs", leave=False, disable=len(task.inputs) < 1000)]


def missing(rows: Iterable[Row]) -> list[Row]:
    """The rows whose picture is not there yet; a picture that two rows share is named once."""
    return list({row.path: row for row in rows if not row.path.exists()}.values())


def save(image: np.ndarray, row: Row, decided: Mapping | None = None) -> None:
    """Writes an (H, W, 3) uint8 picture where `row` says, and into it what was decided about it."""
    text = PngInfo()
    if decided:
        text.add_text("decided", json.dumps(decided))
    write_picture(row.path, image, text)


def write_picture(path: Path, image: np.ndarray, text: PngInfo | None = None) -> None:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", pnginfo=text)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def load(rows: Sequence[Row], which: str = "path") -> np.ndarray:
    """The pictures (N, H, W, 3) uint8; `which` may also be "base" or "source", where all rows have one."""
    pictures = []
    for row in rows:
        with _opened(getattr(row, which)) as image:
            pictures.append(np.asarray(image.convert("RGB")))
    return np.stack(pictures)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """A picture of the store. Raises UserError if it cannot be read: none is left out of a measurement silently."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError) as error:  # Pillow's, for a damaged PNG
        raise UserError(
            f"{path} cannot be read as a picture ({error}). Remove it: the same command draws it again."
        ) from error


def keep(folder: Path, pictures: Mapping[str, Image.Image]) -> None:
    """Writes pictures under their captions, in their order."""
    for i, (caption, picture) in enumerate(pictures.items()):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / f"{i}-{caption.replace(' ', '-')}.png", buffer.getvalue())


def figures(run: Path) -> dict[str, Path]:
    """What `keep` wrote below a run's folder, by caption."""
    return {p.stem.partition("-")[2].replace("-", " "): p for p in sorted((run / "figures").glob("*.png"))}


def with_decisions(row: Row) -> Row:
    """The row and what its picture, which is there, says was decided about it."""
    with _opened(row.path) as image:
        return replace(row, decided=json.loads(getattr(image, "text", {}).get("decided", "{}")))


def write_named(folder: Path, rows: Iterable[Row]) -> None:
    """The pictures made of inputs, as PNG files below `folder` under the inputs' names: no copies where links work."""
    for row in rows:
        name = folder / (row.prompt if row.prompt.endswith(".png") else f"{row.prompt}.png")
        name.parent.mkdir(parents=True, exist_ok=True)
        partial = name.with_name(f".{name.name}.{os.getpid()}.partial")
        try:
            try:
                os.link(row.path, partial)
            except OSError:  # another disk
                shutil.copyfile(row.path, partial)
            partial.replace(name)
        finally:
            partial.unlink(missing_ok=True)


def write_manifest(path: Path, rows: Iterable[Row]) -> None:
    """A CSV a spreadsheet can open; paths are relative to it, labels, decisions and regions are JSON."""
    text = io.StringIO()
    table = csv.DictWriter(text, [f.name for f in fields(Row)])
    table.writeheader()
    for row in rows:
        told = asdict(row)
        told |= {name: json.dumps(told[name]) for name in ("labels", "decided", "regions")}
        told |= {n: os.path.relpath(told[n], path.parent) for n in PATHS if told[n]}
        table.writerow(told)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue())


def read_manifest(path: Path) -> list[Row]:
    """The rows that `write_manifest` wrote."""

    def picture(told: str | None) -> Path | None:
        return (path.parent / told).resolve() if told else None

    def row(told: dict[str, str]) -> Row:
        return Row(
            path=picture(told["path"]),
            prompt=told["prompt"],
            role=told["role"],
            labels=json.loads(told["labels"]),
            seed=int(told["seed"]),
            guidance_scale=float(told["guidance_scale"]) if told["guidance_scale"] else None,
            decided=json.loads(told["decided"]),
            base=picture(told.get("base")),
            source=picture(told.get("source")),
            regions=tuple(Region(tuple(r.pop("box")), **r) for r in json.loads(told.get("regions") or "[]")),
            concept=told.get("concept") or "",
            comeback=picture(told.get("comeback")),
        )

    with path.open(newline="") as file:
        return [row(told) for told in csv.DictReader(file)]

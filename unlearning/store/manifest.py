"""Manifests: one row for each image of a run, with what it shows, why it was generated, and where it is stored.

The image store holds each generated image once, under a key of all that it depends on. The folder is named by a digest
of model, erasure and sampler; the file by a digest of prompt, seed and what else is the image's own. Every run that
needs the same image finds it there; any change gives another key.
"""

import csv
import hashlib
import io
import json
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from unlearning.concepts import Input, Prompt, Region, UnlearningTask
from unlearning.errors import UserError
from unlearning.store.files import digest, file_digest, write_atomically
from unlearning.store.images import read_decided, read_images, write_image

PATHS = ("path", "base", "source", "comeback", "oracle")  # the columns that name files
JSON = ("labels", "decided", "regions")
csv.field_size_limit(2**31 - 1)  # by default, a cell of 131,072 characters is an error


@dataclass(frozen=True)
class ManifestRow:
    """One image.

    Attributes:
        path: Where the image is, or will be.
        prompt: The prompt; for an image-to-image model the input's name.
        role: As a prompt's (`unlearning.concepts.Prompt`).
        labels: As a prompt's.
        seed: The seed of the image's own random generator.
        guidance_scale: The image's own guidance scale; None is the sampler's.
        decided: What was decided about the image while it was generated, by a guidance or an edit; JSON values.
        base: The unedited model's image for the same prompt and seed; None if that is the image itself. Of an attacked
            image it is the erased model's before the attack.
        source: The input image of an image-to-image model.
        regions: What is known to be in the input image.
        concept: The name of the erased concept that the image belongs to; "" if it belongs to none.
        comeback: A file of tensors that an attack gives this image (`unlearning.sampling.attack_result`).
        oracle: The image of the model that never knew the concept, for the same prompt and seed; None if the run does
            not compare with it.
        height, width: As a prompt's.
    """

    path: Path
    prompt: str
    role: str
    labels: dict[str, str]
    seed: int
    guidance_scale: float | None = None
    decided: dict = field(default_factory=dict)
    base: Path | None = None
    source: Path | None = None
    regions: tuple[Region, ...] = ()
    concept: str = ""
    comeback: Path | None = None
    oracle: Path | None = None
    height: int | None = None
    width: int | None = None


def image_seed(seed: int, prompt: str, sample: int) -> int:
    """The seed of one image, from the run's seed, the prompt's text and the image's number.

    It does not depend on the prompt's place in a list: two tasks with a prompt in common share its images.
    """
    return int(np.random.SeedSequence([seed, zlib.crc32(prompt.encode()), sample]).generate_state(1)[0])


def image_path(
    folder: Path,
    prompt: str,
    seed: int,
    guidance_scale: float | None = None,
    comeback: Path | None = None,
    size: tuple[int | None, int | None] = (None, None),
) -> Path:
    """The path of a stored image: a file in `folder`, named by a digest of all else that the image depends on.

    Args:
        folder: The folder of model, erasure and sampler.
        prompt, seed: The image's.
        guidance_scale: The image's own; None is the sampler's.
        comeback: A file of tensors from an attack; its content counts, not its name.
        size: The image's own height and width; None is the model's.
    """
    own: list[object] = [] if guidance_scale is None else [guidance_scale]
    own += [] if comeback is None else [file_digest(comeback)]
    own += [] if size == (None, None) else [size]
    return folder / f"{digest(prompt, seed, *own)}.png"


def manifest(folder: Path, task: UnlearningTask, seed: int) -> list[ManifestRow]:
    """One row for each image of the task's evaluation; the image files may not exist yet.

    Args:
        folder: The folder of model, erasure and sampler in the store.
        task: Its prompts are used.
        seed: The run's seed, for prompts that have none.

    Raises:
        UserError: If the task has no prompts.
    """
    if not task.prompts:
        raise UserError("A text-to-image model needs prompts, and this dataset has none: choose another dataset=...")

    def row(prompt: Prompt, sample: int) -> ManifestRow:
        own = image_seed(seed, prompt.text, sample) if prompt.seed is None else prompt.seed + sample
        path = image_path(folder, prompt.text, own, prompt.guidance_scale, size=(prompt.height, prompt.width))
        return ManifestRow(
            path, prompt.text, prompt.role, prompt.labels, own, prompt.guidance_scale, concept=prompt.concept,
            height=prompt.height, width=prompt.width,
        )  # fmt: skip

    return [row(prompt, i) for prompt in task.prompts for i in range(task.images_per_prompt)]


def manifest_of_inputs(folder: Path, task: UnlearningTask, seed: int) -> list[ManifestRow]:
    """As `manifest`, for an image-to-image model. Input images are written into the store too.

    Raises:
        UserError: If the task has no inputs.
    """
    if not task.inputs:
        raise UserError(
            "An image-to-image model needs input images: choose dataset=emoji_scenes, or dataset=folder with "
            "input=/path/to/a/folder."
        )

    def row(given: Input) -> ManifestRow:
        image = given.read()
        content = digest(image.shape, hashlib.sha256(image.tobytes()).hexdigest())
        source = folder.parent / "inputs" / f"{content}.png"
        if not source.exists():
            write_image(source, image)
        own = image_seed(seed, content, 0)
        path = folder / f"{digest(content, own, [asdict(region) for region in given.regions])}.png"
        return ManifestRow(
            path, given.name, given.role, {}, own, source=source, regions=given.regions, concept=given.concept
        )

    return [row(given) for given in tqdm(task.inputs, "inputs", leave=False, disable=len(task.inputs) < 1000)]


def missing(rows: Iterable[ManifestRow]) -> list[ManifestRow]:
    """The rows whose image does not exist. An image that two rows share occurs once."""
    return list({row.path: row for row in rows if not row.path.exists()}.values())


def batches(rows: Iterable[ManifestRow], most: int) -> Iterator[list[ManifestRow]]:
    """The rows in batches of images of one size, at most so many in each; rows of a size keep their order."""
    by_size: dict[tuple[int | None, int | None], list[ManifestRow]] = {}
    for row in rows:
        by_size.setdefault((row.height, row.width), []).append(row)
    for alike in by_size.values():
        yield from (alike[i : i + most] for i in range(0, len(alike), most))


def load_images(rows: Sequence[ManifestRow], which: str = "path") -> np.ndarray:
    """The images of the rows, (N, H, W, 3) uint8, which must have one size (`batches`).

    Args:
        which: "path", or "base", "source" or "oracle" if all rows have one.

    Raises:
        UserError: If an image cannot be read.
    """
    return read_images(getattr(row, which) for row in rows)


def with_decided(row: ManifestRow) -> ManifestRow:
    """The row with the decisions that are stored in its image, which must exist."""
    return replace(row, decided=read_decided(row.path))


def link_outputs(folder: Path, rows: Iterable[ManifestRow]) -> None:
    """Puts the outputs of an image-to-image model into `folder`, under the names of the inputs.

    They are hard links; copies if the store is on another disk. An input "x.jpg" has the output "x.jpg.png", or, if
    there is an input of that name, "x.jpg.png.png".
    """
    rows = list(rows)
    taken = {row.prompt for row in rows if row.prompt.endswith(".png")}
    for row in rows:
        output = row.prompt
        while not output.endswith(".png") or (output in taken and output != row.prompt):
            output += ".png"
        name = folder / output
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


def write_manifest(path: Path, rows: Iterable[ManifestRow]) -> None:
    """Writes a CSV. File names are relative to it; labels, decisions and regions are JSON."""
    text = io.StringIO()
    table = csv.DictWriter(text, [f.name for f in fields(ManifestRow)])
    table.writeheader()
    for row in rows:
        cells = asdict(row)
        cells |= {name: json.dumps(cells[name]) for name in JSON}
        cells |= {name: os.path.relpath(cells[name], path.parent) for name in PATHS if cells[name]}
        table.writerow(cells)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue())


def read_manifest(path: Path) -> list[ManifestRow]:
    """Reads what `write_manifest` has written. Columns that earlier versions did not have may be missing.

    Raises:
        UserError: If the file is not a manifest.
    """

    def file(cell: str | None) -> Path | None:
        return (path.parent / cell).resolve() if cell else None

    def row(cells: dict[str, str]) -> ManifestRow:
        return ManifestRow(
            path=(path.parent / cells["path"]).resolve(),
            prompt=cells["prompt"],
            role=cells["role"],
            labels=json.loads(cells["labels"]),
            seed=int(cells["seed"]),
            guidance_scale=float(cells["guidance_scale"]) if cells["guidance_scale"] else None,
            decided=json.loads(cells["decided"]),
            base=file(cells.get("base")),
            source=file(cells.get("source")),
            regions=tuple(Region(tuple(r.pop("box")), **r) for r in json.loads(cells.get("regions") or "[]")),
            concept=cells.get("concept") or "",
            comeback=file(cells.get("comeback")),
            oracle=file(cells.get("oracle")),
            height=int(cells.get("height") or 0) or None,
            width=int(cells.get("width") or 0) or None,
        )

    try:
        return [row(cells) for cells in read_cells(path)]
    except (KeyError, ValueError, TypeError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error!r}). Delete it; the same command writes it again.") from error


def read_cells(path: Path) -> list[dict[str, str]]:
    """The rows of a manifest as they are written, by column. Raises ValueError or csv.Error if it is not a manifest."""
    return list(each_row(path))


def each_row(path: Path) -> Iterator[dict[str, str]]:
    """As `read_cells`, read one row at a time."""
    with path.open(newline="") as text:
        table = csv.DictReader(text)
        if not {"path", "prompt", "role", "seed"} <= set(table.fieldnames or ()):
            raise ValueError("columns are missing")  # an empty file is not an empty manifest
        for row in table:
            if not row["path"]:
                raise ValueError("a row has no path")
            yield row

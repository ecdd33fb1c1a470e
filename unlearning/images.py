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
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from unlearning.concepts import Prompt, UnlearningTask


def digest(*parts: object) -> str:
    """Sixteen hexadecimal digits that stand for the content of `parts` (anything JSON can hold)."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def write_atomically(path: Path, content: bytes | str) -> None:
    """All of the file or none of it, whatever happens on the way."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@dataclass(frozen=True)
class Row:
    """One picture of a manifest: what was asked for, why, and where the picture is.

    `guidance_scale` is None where it is the sampler's; `decided` is what the model's guidance decided about the prompt.
    """

    path: Path
    prompt: str
    role: str
    labels: dict[str, str]
    seed: int
    guidance_scale: float | None = None
    decided: dict[str, float] = field(default_factory=dict)


def image_seed(seed: int, prompt: str, sample: int) -> int:
    """The seed of one picture: of the run's seed, the prompt's text and the picture's number.

    Not of the prompt's place in a list, so that two tasks that share a prompt share its pictures.
    """
    return int(np.random.SeedSequence([seed, zlib.crc32(prompt.encode()), sample]).generate_state(1)[0])


def manifest(folder: Path, task: UnlearningTask, seed: int) -> list[Row]:
    """The pictures that `task` asks for, whether they exist yet or not. `folder` is the model's place in the store."""

    def row(prompt: Prompt, sample: int) -> Row:
        s = image_seed(seed, prompt.text, sample) if prompt.seed is None else prompt.seed + sample
        own = () if prompt.guidance_scale is None else (prompt.guidance_scale,)
        path = folder / f"{digest(prompt.text, s, *own)}.png"
        return Row(path, prompt.text, prompt.role, prompt.labels, s, prompt.guidance_scale)

    return [row(p, i) for p in task.prompts for i in range(task.images_per_prompt)]


def missing(rows: Iterable[Row]) -> list[Row]:
    """The rows whose picture is not there yet; a picture that two rows share is named once."""
    return list({row.path: row for row in rows if not row.path.exists()}.values())


def save(image: np.ndarray, row: Row, decided: Mapping[str, float] | None = None) -> None:
    """Writes an (H, W, 3) uint8 picture where `row` says, and into it what was decided about its prompt."""
    buffer, text = io.BytesIO(), PngInfo()
    if decided:
        text.add_text("decided", json.dumps(decided))
    Image.fromarray(image).save(buffer, "PNG", pnginfo=text)
    row.path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(row.path, buffer.getvalue())


def load(rows: Sequence[Row]) -> np.ndarray:
    """The pictures (N, H, W, 3) uint8."""
    return np.stack([np.asarray(Image.open(row.path).convert("RGB")) for row in rows])


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
    with Image.open(row.path) as image:
        return replace(row, decided=json.loads(getattr(image, "text", {}).get("decided", "{}")))


def write_manifest(path: Path, rows: Iterable[Row]) -> None:
    """A CSV a spreadsheet can open; paths are relative to it, labels and decisions are JSON."""
    text = io.StringIO()
    table = csv.DictWriter(text, [f.name for f in fields(Row)])
    table.writeheader()
    for row in rows:
        told = {"labels": json.dumps(row.labels), "decided": json.dumps(row.decided)}
        table.writerow({**asdict(row), **told, "path": os.path.relpath(row.path, path.parent)})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text.getvalue())


def read_manifest(path: Path) -> list[Row]:
    """The rows that `write_manifest` wrote."""

    def row(told: dict[str, str]) -> Row:
        return Row(
            path=(path.parent / told["path"]).resolve(),
            prompt=told["prompt"],
            role=told["role"],
            labels=json.loads(told["labels"]),
            seed=int(told["seed"]),
            guidance_scale=float(told["guidance_scale"]) if told["guidance_scale"] else None,
            decided=json.loads(told["decided"]),
        )

    with path.open(newline="") as file:
        return [row(told) for told in csv.DictReader(file)]

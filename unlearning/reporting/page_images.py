"""Images of a page: thumbnails, and which images a page over many runs shows."""

import base64
import csv
import io
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from PIL import Image

from unlearning.concepts import ATTACK, ERASE, RETAIN, SYNONYM
from unlearning.errors import UserError
from unlearning.reporting.runs import DRAWINGS, FinishedRun, drawings
from unlearning.store.images import opened
from unlearning.store.manifest import each_row

log = logging.getLogger(__name__)
SAMPLES = {ERASE: 2, SYNONYM: 1, RETAIN: 2}  # prompts of a concept that a page over many runs shows, by role

# --- images inside a page ---------------------------------------------------------------------------------------------


def encode(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    """The file content of an image."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def data_uri(content: bytes, kind: str = "png") -> str:
    """An image file as a URI that a page may hold."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def thumbnail(path: Path, side: int, kind: str = "png", **options: object) -> str | None:
    """The image as a data URI of at most `side` pixels a side; None if there is no readable image."""
    try:
        with opened(path) as image:
            image = image.convert("RGB")
    except UserError:
        return None
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return data_uri(encode(image, kind, **options), kind)


# --- which images a page over many runs shows -------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Images of one prompt and seed, by the unedited model and after each method.

    Attributes:
        role: The role of the prompt, or the name of the drawing ("attacked-cce").
        before: The base model's image; None if there is none.
        after: By row of the comparison; None if there is none.
    """

    prompt: str
    role: str
    before: Path | None
    after: Mapping[tuple, Path | None]


def samples(rows: Mapping[tuple, Sequence[FinishedRun]], count: int) -> list[Sample]:
    """At most `count` samples of one concept; `rows` are the runs of each row of the comparison.

    All samples have the seed that most rows have. For each role, prompts are evenly spaced in the manifest, and the
    first image of each is shown. Of every other drawing, the first image is shown: an attack may change the prompt for
    each method, but it keeps the image's seed. Manifests are read only as far as needed.
    """
    seeds = [seed for runs in rows.values() for seed in dict.fromkeys(run["seed"] for run in runs)]
    if not seeds or not count:
        return []
    seed = max(sorted(set(seeds), key=str), key=seeds.count)
    runs = {key: run for key, group in rows.items() for run in reversed(group) if run["seed"] == seed}
    manifests = {key: drawings(run.folder) for key, run in runs.items()}
    bases = ((of["base"], _chosen(of["base"], count)) for of in manifests.values() if "base" in of)
    base, chosen = next((pair for pair in bases if pair[1]), (None, []))
    after = {key: _find(of["erased"], chosen) for key, of in manifests.items() if "erased" in of}
    sampled = []
    for line in chosen:
        images = {key: after.get(key, {}).get(_identity(line)) for key in rows}
        sampled.append(Sample(line["prompt"], line["role"], line["path"], images))
    others = dict.fromkeys(name for of in manifests.values() for name in of if name not in DRAWINGS)
    for name in list(others)[: count - len(sampled)]:
        shown = next((line for of in manifests.values() if name in of for line in _lines(of[name])), None)
        if shown:
            images = {key: _of_seed(manifests.get(key, {}).get(name), shown) for key in rows}
            sampled.append(Sample(shown["prompt"], name, _of_seed(base, shown, ERASE), images))
    return sampled


def _of_seed(manifest: Path | None, line: Mapping, role: str = ATTACK) -> Path | None:
    """The first image of a role with the same seed as `line`."""
    same = (
        other["path"]
        for other in (_lines(manifest) if manifest else ())
        if (other["seed"], other["role"]) == (line["seed"], role)
    )
    return next(same, None)


def _lines(manifest: Path) -> Iterator[dict]:
    """The lines of a manifest, up to one that is damaged; "path" is the path of the image."""
    try:
        for line in each_row(manifest):
            yield {**line, "path": manifest.parent / line["path"]}
    except (ValueError, csv.Error) as error:
        _warn_of_damage(manifest, str(error))


@cache  # a manifest is read more than once
def _warn_of_damage(manifest: Path, why: str) -> None:
    log.warning("%s is damaged (%s): images are left out. The generate stage writes it again.", manifest, why)


def _identity(line: Mapping) -> tuple[str, str]:
    return line["prompt"], line["seed"]


def _chosen(manifest: Path, count: int) -> list[dict]:
    """At most `count` lines, shared among the roles as in SAMPLES."""
    prompts: dict[str, dict[str, list[dict]]] = {}
    for line in _lines(manifest):
        prompts.setdefault(line["role"], {}).setdefault(line["prompt"], []).append(line)
    chosen = []
    for role, wanted in SAMPLES.items():
        images = list(prompts.get(role, {}).values())
        spread = [images[i * len(images) // wanted] for i in range(min(wanted, len(images)))]
        extra = spread[0][1 : 1 + wanted - len(spread)] if spread else []  # one prompt: its next images
        chosen.append([*(lines[0] for lines in spread), *extra])
    order = [line for i in range(max(map(len, chosen))) for lines in chosen for line in lines[i : i + 1]]
    return sorted(order[:count], key=lambda line: list(SAMPLES).index(line["role"]))


def _find(manifest: Path, chosen: Sequence[Mapping]) -> dict[tuple[str, str], Path]:
    """The images of the chosen prompts and seeds; reads no further than the last of them."""
    missing, paths = {_identity(line) for line in chosen}, {}
    for line in _lines(manifest) if missing else ():
        if _identity(line) in missing:
            paths[_identity(line)] = line["path"]
            missing.remove(_identity(line))
        if not missing:
            break
    return paths

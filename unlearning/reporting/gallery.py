"""Which pictures a page over many runs shows: the same prompt and seed, before and after each method.

Nobody picks them: of a concept and a role the prompts are taken at even distances, and of a prompt the first picture.
Manifests are read no further than the rows that are shown.
"""

import csv
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from unlearning.concepts import ERASE, RETAIN, SYNONYM
from unlearning.reporting.embedding import thumbnail

SHOTS = {ERASE: 2, SYNONYM: 1, RETAIN: 2}  # pictures of a concept, by role
PICTURES = 1000  # on a page, at most
SIDE, QUALITY = (
    160,
    75,
)  # pixels and WebP's scale: at 60 thin lines fray, at 90 nothing more is seen for twice the bytes


def picture(path: Path) -> str | None:
    """A thumbnail as a data URI; None where there is no picture."""
    return thumbnail(path, SIDE, "webp", quality=QUALITY)


@dataclass(frozen=True)
class Shot:
    """One prompt and seed: its picture before, and after by row of the table. None where one was not drawn."""

    prompt: str
    role: str
    before: Path | None
    after: Mapping[tuple, Path | None]


def _rows(manifest: Path) -> Iterator[dict[str, str]]:
    if manifest.exists():
        with manifest.open(newline="") as file:
            yield from csv.DictReader(file)


def _asked(manifest: Path, count: int) -> list[dict[str, str]]:
    """The rows of at most `count` pictures, shared out among the roles as SHOTS says."""
    prompts: dict[str, dict[str, list[dict]]] = {}
    for row in _rows(manifest):
        prompts.setdefault(row["role"], {}).setdefault(row["prompt"], []).append(row)
    picked = []
    for role, wanted in SHOTS.items():
        drawn = list(prompts.get(role, {}).values())
        spread = [drawn[i * len(drawn) // wanted] for i in range(min(wanted, len(drawn)))]
        extra = spread[0][1 : 1 + wanted - len(spread)] if spread else []  # one prompt: its next pictures
        picked.append([*(pictures[0] for pictures in spread), *extra])
    order = [row for i in range(max(map(len, picked))) for rows in picked for row in rows[i : i + 1]]
    return sorted(order[:count], key=lambda row: list(SHOTS).index(row["role"]))


def _found(manifest: Path, asked: Sequence[Mapping]) -> dict[tuple[str, str], Path]:
    """Where the pictures of the rows `asked` are, by prompt and seed; reads no further than the last of them."""
    missing, found = {(row["prompt"], row["seed"]) for row in asked}, {}
    for row in _rows(manifest):
        key = (row["prompt"], row["seed"])
        if key in missing:
            missing.remove(key)
            found[key] = manifest.parent / row["path"]
        if not missing:
            break
    return found


def shots(groups: Mapping[tuple, Sequence[Mapping]], count: int) -> list[Shot]:
    """At most `count` of them, of the runs of one concept by row of the table.

    All are of one seed of the runs, that which most rows have.
    """
    seeds = [run["seed"] for runs in groups.values() for run in {run["seed"]: run for run in runs}.values()]
    if not seeds or not count:
        return []
    seed = max(sorted(set(seeds), key=str), key=seeds.count)
    folders = {
        key: run["run"] / "images" for key, runs in groups.items() for run in reversed(runs) if run["seed"] == seed
    }
    first = next(iter(folders.values()))
    asked = _asked(first / "base.csv", count)
    after = {key: _found(folder / "erased.csv", asked) for key, folder in folders.items()}
    return [
        Shot(
            row["prompt"],
            row["role"],
            first / row["path"],
            {key: after.get(key, {}).get((row["prompt"], row["seed"])) for key in groups},
        )
        for row in asked
    ]

"""The image store seen as a whole: what it holds, and what of it can go.

unlearn-store                                  # how much there is of which model and erasure
unlearn-store --prune                          # what no run refers to; deletes nothing
unlearn-store --prune --delete                 # deletes it
unlearn-store --prune --older-than 30 --down-to 5GB --delete
"""

import argparse
import csv
import json
import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from unlearning.errors import UserError
from unlearning.store.files import digest, write_atomically
from unlearning.store.locks import RUN_LOCK, in_use

ABOUT = "about.json"
SIGNED, NOTED = "drawn-by", "runs"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
DAY = 24 * 3600
COLUMNS = ("path", "base", "source")  # of a manifest, that name pictures


def describe(folder: Path, about: Mapping[str, str]) -> None:
    """Says in a folder of pictures, the first time, whose they are: a digest cannot be read back."""
    if not (folder / ABOUT).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / ABOUT, json.dumps(about, indent=2))


def sign(folder: Path, names: Sequence[str], code: Mapping) -> None:
    """Says in a folder which code is about to draw these of its pictures."""
    told = {"code": code, "pictures": names}
    (folder / SIGNED).mkdir(parents=True, exist_ok=True)
    write_atomically(folder / SIGNED / f"{digest(told)}.json", json.dumps(told))


def signed(folder: Path) -> dict[str, dict]:
    """The code that drew a picture, by the picture's name: that which was the last to set about it."""
    paths = sorted((folder / SIGNED).glob("[!.]*"), key=lambda path: path.stat().st_mtime_ns)
    told = [json.loads(path.read_text()) for path in paths]
    return {name: each["code"] for each in told for name in each["pictures"]}


def note(store: Path, runs: Path) -> None:
    """Says in a store that runs in this folder refer to its pictures."""
    path = store / NOTED / digest(str(runs.resolve()))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, str(runs.resolve()))


def noted(store: Path) -> list[Path]:
    """The folders of runs that a store knows of, without those that are gone."""
    folders = (Path(path.read_text()) for path in (store / NOTED).glob("[!.]*"))
    return [folder for folder in folders if folder.is_dir()]


@dataclass(frozen=True)
class Picture:
    path: Path
    size: int
    time: float  # when it was drawn, in seconds since 1970

    @property
    def key(self) -> tuple[str, ...]:
        """What a manifest calls it, wherever the store is."""
        return self.path.parts[-2:]


def pictures(store: Path) -> list[Picture]:
    """Every picture of a store, and what is left of those that a process died writing.

    Raises UserError where there is no store.
    """
    if not (store / "images").is_dir():
        raise UserError(f"There is no image store at {store}. Name its folder: unlearn-store --store outputs/store.")
    found = []
    for folder in os.scandir(store / "images"):
        for file in os.scandir(folder) if folder.is_dir() else ():
            if file.name.endswith((".png", ".partial")):
                state = file.stat()
                found.append(Picture(Path(file.path), state.st_size, state.st_mtime))
    return found


def referred_to(runs: Iterable[Path]) -> set[tuple[str, ...]]:
    """The keys of all pictures in the manifests below these folders.

    Raises UserError for a folder that is not there: everything would seem to be referred to by nothing.
    """
    keys = set()
    for folder in runs:
        if not folder.is_dir():
            raise UserError(f"There is no folder of runs at {folder}. Name where they are: --runs outputs/runs.")
        for manifest in folder.rglob("images/*.csv"):
            with manifest.open(newline="") as file:
                rows = csv.DictReader(file)
                keys |= {Path(row[c]).parts[-2:] for row in rows for c in COLUMNS if row.get(c)}
    return keys


def at_work(runs: Iterable[Path]) -> list[Path]:
    """The folders of runs that a process is working in. Their newest images may not be in a manifest yet."""
    return [lock.parent for folder in runs for lock in folder.rglob(RUN_LOCK) if in_use(lock.parent)]


def to_delete(
    found: Sequence[Picture], kept: set[tuple[str, ...]], older_than: float = 0, down_to: float | None = None
) -> list[Picture]:
    """The pictures that can go, the oldest first.

    Args:
        kept: The keys of pictures that stay.
        older_than: Days since a picture was drawn.
        down_to: Bytes; no more go than it takes for the rest to fit in them.
    """
    before, total, chosen = time.time() - older_than * DAY, sum(p.size for p in found), []
    for picture in sorted(found, key=lambda p: p.time):
        if down_to is not None and total <= down_to:
            break
        if picture.key not in kept and picture.time <= before:
            chosen.append(picture)
            total -= picture.size
    return chosen


def delete(chosen: Iterable[Picture]) -> None:
    """Deletes pictures, and the folders that hold none afterwards."""
    folders = set()
    for picture in chosen:
        picture.path.unlink(missing_ok=True)
        folders.add(picture.path.parent)
    for folder in folders:
        if not any(folder.glob("*.png")):
            shutil.rmtree(folder, ignore_errors=True)


def listing(found: Iterable[Picture], title: str):
    """A table of pictures by model, erasure and sampler, the largest first."""
    from rich.table import Table

    groups: dict[Path, list[Picture]] = defaultdict(list)
    for picture in found:
        groups[picture.path.parent].append(picture)
    table = Table("model", "erasure", "sampler", "folder", title=title, title_justify="left", box=None)
    for name in ("pictures", "size", "last drawn"):
        table.add_column(name, justify="right", no_wrap=True)
    for folder, own in sorted(groups.items(), key=lambda item: -sum(p.size for p in item[1])):
        about = json.loads((folder / ABOUT).read_text()) if (folder / ABOUT).exists() else {}
        said = [about.get(name, "?") for name in ("model", "erasure", "sampler")]
        last = time.strftime("%Y-%m-%d", time.localtime(max(p.time for p in own)))
        table.add_row(*said, folder.name, f"{len(own):,}", in_units(sum(p.size for p in own)), last)
    return table


def in_units(size: float) -> str:
    unit = max((u for u in UNITS if size >= UNITS[u]), key=UNITS.get, default="")
    return f"{size / UNITS[unit]:.3g} {unit}B"


def in_bytes(text: str) -> float:
    """Of "5GB", "200 MB", "1e9". Raises ArgumentTypeError for anything else."""
    match = re.fullmatch(r"([\d.]+(?:e\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; one is 500MB, another 5GB")
    return float(match[1]) * UNITS[match[2].upper()]


def report(store: Path, runs: Sequence[Path], prune: bool, older_than: float, down_to: float | None,
           referred: bool, really: bool) -> None:  # fmt: skip
    """What the command does and prints. Raises UserError where there is no store or no run, or a run is at work."""
    from rich.console import Console

    console, found = Console(), pictures(store)
    if not prune:
        console.print(listing(found, str(store)))
        console.print(f"{len(found):,} pictures, {in_units(sum(p.size for p in found))}")
        return
    runs = [*runs, *noted(store)]
    if busy := at_work(runs):
        raise UserError(
            f"A run is at work in {busy[0]}, and its pictures are in no manifest yet. Wait until it is over."
        )
    chosen = to_delete(found, set() if referred else referred_to(runs), older_than, down_to)
    console.print(listing(chosen, "Deleted" if really else "These would go"))
    if really:
        delete(chosen)
    told = "" if really or not chosen else "; nothing is deleted without --delete"
    console.print(f"{len(chosen):,} of {len(found):,} pictures, {in_units(sum(p.size for p in chosen))}{told}")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="unlearn-store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path, default=Path("outputs/store"))
    parser.add_argument(
        "--runs",
        type=Path,
        nargs="+",
        default=[Path("outputs/runs")],
        help="whose pictures stay, besides the runs that the store knows of",
    )
    parser.add_argument("--prune", action="store_true", help="list what can go: pictures that no run refers to")
    parser.add_argument("--older-than", type=float, default=0, metavar="DAYS", help="of those, only these")
    parser.add_argument("--down-to", type=in_bytes, metavar="SIZE", help="the oldest first, until the store fits: 5GB")
    parser.add_argument("--all", action="store_true", dest="referred", help="what runs refer to may go as well")
    parser.add_argument("--delete", action="store_true", dest="really", help="delete what is listed")
    try:
        report(**vars(parser.parse_args()))
    except UserError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()

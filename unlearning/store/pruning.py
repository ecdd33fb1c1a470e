"""The whole image store: what it holds, and which images can be deleted.

unlearn-store                                  # counts images by model and erasure
unlearn-store --prune                          # lists images that no run refers to; deletes nothing
unlearn-store --prune --delete                 # deletes them
unlearn-store --prune --older-than 30 --down-to 5GB --delete
"""

import argparse
import csv
import errno
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
from unlearning.store.files import digest, read_state, write_atomically
from unlearning.store.locks import RUN_LOCK, in_use
from unlearning.store.manifest import read_cells

ABOUT = "about.json"
SIGNED, NOTED = "drawn-by", "runs"
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
DAY = 24 * 3600
COLUMNS = ("path", "base", "source", "oracle")  # the columns of a manifest that name images


def describe(folder: Path, about: Mapping[str, str]) -> None:
    """Writes what a folder's images were generated with, once: its name is a digest, which cannot be read back."""
    if not (folder / ABOUT).exists():
        _write(folder / ABOUT, json.dumps(about, indent=2))


def sign(folder: Path, names: Sequence[str], code: Mapping) -> None:
    """Records which version of the code is about to generate these images of a folder."""
    record = {"code": code, "pictures": names}
    (folder / SIGNED).mkdir(parents=True, exist_ok=True)
    write_atomically(folder / SIGNED / f"{digest(record)}.json", json.dumps(record))


def signed(folder: Path) -> dict[str, dict]:
    """The code that generated each image of a folder, by the image's file name. The latest record counts."""
    paths = sorted((folder / SIGNED).glob("[!.]*.json"), key=lambda path: path.stat().st_mtime_ns)
    records = [read_state(path, lambda record: dict.fromkeys(record["pictures"], record["code"])) for path in paths]
    return {name: code for record in records if record for name, code in record.items()}


def note(store: Path, runs: Path) -> None:
    """Records in a store that runs in this folder refer to its images."""
    path = store / NOTED / digest(str(runs.resolve()))
    if not path.exists():
        _write(path, str(runs.resolve()))


def _write(path: Path, content: str) -> None:
    """Writes a file about the store, unless the store can only be read: then nothing in it can be pruned either."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, content)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
            raise


def noted(store: Path) -> list[Path]:
    """The folders of runs that are recorded in a store and still exist. Raises UserError for a damaged record."""
    folders = []
    for path in (store / NOTED).glob("[!.]*"):
        folder = Path(os.fsdecode(path.read_bytes()))
        if path.name != digest(str(folder)):
            raise UserError(
                f"{path} is damaged: it named a folder of runs, whose images would seem to be unused. Delete it, and "
                "name that folder: unlearn-store --runs FOLDER."
            )
        folders.append(folder)
    return [folder for folder in folders if folder.is_dir()]


@dataclass(frozen=True)
class StoredImage:
    """One image file of the store; size in bytes, time of its last change in seconds since 1970."""

    path: Path
    size: int
    time: float

    @property
    def key(self) -> tuple[str, ...]:
        """Its folder and file name, which identify it in manifests even if the store has moved."""
        return self.path.parts[-2:]


def stored_images(store: Path) -> list[StoredImage]:
    """All images of a store, and the partial files of processes that were killed while they wrote.

    Raises:
        UserError: If there is no store.
    """
    if not (store / "images").is_dir():
        raise UserError(f"There is no image store at {store}. Give its folder: unlearn-store --store outputs/store.")
    images = []
    for folder in os.scandir(store / "images"):
        for file in os.scandir(folder) if folder.is_dir() else ():
            if file.name.endswith((".png", ".partial")):
                state = file.stat()
                images.append(StoredImage(Path(file.path), state.st_size, state.st_mtime))
    return images


def referred_to(runs: Iterable[Path]) -> set[tuple[str, ...]]:
    """The keys of all images in the manifests below these folders.

    Raises:
        UserError: If a folder does not exist, or a manifest cannot be read. Otherwise images would seem to be unused.
    """
    keys = set()
    for folder in runs:
        if not folder.is_dir():
            raise UserError(f"There is no folder of runs at {folder}. Give it: unlearn-store --runs outputs/runs.")
        for manifest in folder.rglob("images/*.csv"):
            try:
                rows = read_cells(manifest)
            except (ValueError, csv.Error) as error:
                raise UserError(
                    f"{manifest} is no manifest, or damaged ({error}): the images of its run would seem to be unused. "
                    "Delete it and run its command again, or move a file of your own elsewhere."
                ) from error
            keys |= {Path(row[c]).parts[-2:] for row in rows for c in COLUMNS if row.get(c)}
    return keys


def at_work(runs: Iterable[Path]) -> list[Path]:
    """The folders of runs that a process is working in. Their newest images may not be in a manifest yet."""
    return [lock.parent for folder in runs for lock in folder.rglob(RUN_LOCK) if in_use(lock.parent)]


def to_delete(
    images: Sequence[StoredImage], kept: set[tuple[str, ...]], older_than: float = 0, down_to: float | None = None
) -> list[StoredImage]:
    """The images that can be deleted, the oldest first.

    Args:
        images: All images of the store.
        kept: The keys of images that must stay.
        older_than: Only images of at least this age, in days.
        down_to: No more images than needed for the rest to fit in this size, in bytes.
    """
    before, total, chosen = time.time() - older_than * DAY, sum(image.size for image in images), []
    for image in sorted(images, key=lambda image: image.time):
        if down_to is not None and total <= down_to:
            break
        if image.key not in kept and image.time <= before:
            chosen.append(image)
            total -= image.size
    return chosen


def delete(chosen: Iterable[StoredImage]) -> None:
    """Deletes images, and folders that have no image left."""
    folders = set()
    for image in chosen:
        image.path.unlink(missing_ok=True)
        folders.add(image.path.parent)
    for folder in folders:
        if not any(folder.glob("*.png")):
            shutil.rmtree(folder, ignore_errors=True)


def listing(images: Iterable[StoredImage], title: str):
    """A rich.table.Table of images by model, erasure and sampler, the largest total size first."""
    from rich.markup import escape
    from rich.table import Table

    groups: dict[Path, list[StoredImage]] = defaultdict(list)
    for image in images:
        groups[image.path.parent].append(image)
    table = Table("model", "erasure", "sampler", "folder", title=title, title_justify="left", box=None)
    for name in ("images", "size", "newest"):
        table.add_column(name, justify="right", no_wrap=True)
    for folder, own in sorted(groups.items(), key=lambda item: -_total(item[1])):
        about = read_state(folder / ABOUT, dict) or {}
        names = [escape(str(about.get(name, "?"))) for name in ("model", "erasure", "sampler")]
        newest = time.strftime("%Y-%m-%d", time.localtime(max(image.time for image in own)))
        table.add_row(*names, folder.name, f"{len(own):,}", in_units(_total(own)), newest)
    return table


def _total(images: Iterable[StoredImage]) -> int:
    return sum(image.size for image in images)


def in_units(size: float) -> str:
    """A size in bytes as text: 1500 is "1.5 KB"."""
    unit = max((u for u in UNITS if size >= UNITS[u]), key=lambda u: UNITS[u], default="")
    return f"{size / UNITS[unit]:.3g} {unit}B"


def in_bytes(text: str) -> float:
    """The bytes of a size like "5GB", "200 MB" or "1e9". Raises ArgumentTypeError for any other text."""
    match = re.fullmatch(r"([\d.]+(?:e\d+)?)\s*([KMGT]?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size. Sizes look like 500MB or 5GB")
    return float(match[1]) * UNITS[match[2].upper()]


def report(store: Path, runs: Sequence[Path], prune: bool, older_than: float, down_to: float | None,
           referred: bool, really: bool) -> None:  # fmt: skip
    """Runs the command; the arguments are those of `main`.

    Raises:
        UserError: If there is no store, a folder of runs does not exist, a manifest in it cannot be read, or a run is
            at work.
    """
    from rich.console import Console
    from rich.markup import escape

    console, images = Console(), stored_images(store)
    if not prune:
        console.print(listing(images, escape(str(store))))
        console.print(f"{len(images):,} images, {in_units(_total(images))}")
        return
    runs = [*runs, *noted(store)]
    if busy := at_work(runs):
        raise UserError(f"A run is at work in {busy[0]}; its images are not in a manifest yet. Wait until it ends.")
    chosen = to_delete(images, set() if referred else referred_to(runs), older_than, down_to)
    console.print(listing(chosen, "Deleted" if really else "Can be deleted"))
    if really:
        delete(chosen)
    hint = "" if really or not chosen else "; add --delete to delete them"
    console.print(f"{len(chosen):,} of {len(images):,} images, {in_units(_total(chosen))}{hint}")


def main() -> None:
    """The console command unlearn-store."""
    parser = argparse.ArgumentParser(
        prog="unlearn-store", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path, default=Path("outputs/store"))
    parser.add_argument(
        "--runs",
        type=Path,
        nargs="+",
        default=[Path("outputs/runs")],
        help="folders of runs whose images must stay, besides the runs that the store has recorded",
    )
    parser.add_argument("--prune", action="store_true", help="list images that no run refers to")
    parser.add_argument("--older-than", type=float, default=0, metavar="DAYS", help="only images of at least this age")
    parser.add_argument("--down-to", type=in_bytes, metavar="SIZE", help="only the oldest, until the store fits: 5GB")
    parser.add_argument("--all", action="store_true", dest="referred", help="also images that runs refer to")
    parser.add_argument("--delete", action="store_true", dest="really", help="delete the listed images")
    try:
        report(**vars(parser.parse_args()))
    except UserError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()

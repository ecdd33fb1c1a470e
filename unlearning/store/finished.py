"""Whether a run has nothing left to do, told in milliseconds: nothing heavy is imported, no model is loaded.

A run that has ended leaves a digest of its settings and of the state of every file they name. The same settings over
the same files are the same run; after any change the stages look for themselves what is left to do.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from unlearning.store.files import digest, write_atomically

MARK = ".finished"
CHANGE_NOTHING = ("stages", "objective")  # of what a run leaves on disk
NAME_FILES = ("model", "dataset", "method", "evaluator")  # groups whose settings may be a user's files
LEFT = {
    "fit": "erasure",
    "attack": "erasure",
    "generate": "images/erased.csv",
    "evaluate": "metrics.json",
    "report": "report.html",
}


def state(settings: object) -> list[tuple]:
    """(path, size, time of the last change) of every file that a setting names, or that lies below what it names."""
    return sorted((str(path), (s := path.stat()).st_size, s.st_mtime_ns) for path in set(_files(settings)))


def _files(settings: object) -> Iterator[Path]:
    if isinstance(settings, Mapping | list):
        for value in settings.values() if isinstance(settings, Mapping) else settings:
            yield from _files(value)
    elif isinstance(settings, str) and settings.strip("./"):
        if os.path.exists(settings):  # which, unlike Path.exists, takes any text
            path = Path(settings)
            yield from (p for p in path.rglob("*") if p.is_file()) if path.is_dir() else (path,)
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", settings):
            yield from _downloaded(settings)


def _downloaded(repository: str) -> Iterator[Path]:
    """The files that say which version of a repository of the Hugging Face hub is in the local cache."""
    from huggingface_hub import constants

    refs = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "refs"
    yield from (p for p in refs.rglob("*") if p.is_file())


def key(settings: Mapping) -> str:
    """A digest of all that a run is told, and of the files that it is told of."""
    told = {name: value for name, value in settings.items() if name not in CHANGE_NOTHING}
    return digest(told, state([told.get(name) for name in NAME_FILES]))


def finished(folder: Path, key: str, stages: Sequence[str]) -> bool:
    """Whether these stages have been through in `folder` with the settings of `key`, and what they left is there."""
    done = _read(folder / MARK)
    return done.get("key") == key and all(
        stage in done["stages"] and (folder / LEFT[stage]).exists() for stage in stages
    )


def finish(folder: Path, key: str, stages: Sequence[str]) -> None:
    """Notes that these stages have been through."""
    done = _read(folder / MARK)
    before = done["stages"] if done.get("key") == key else []
    write_atomically(folder / MARK, json.dumps({"key": key, "stages": sorted({*before, *stages})}))


def _read(mark: Path) -> dict:
    return json.loads(mark.read_text()) if mark.exists() else {}

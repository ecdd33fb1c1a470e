"""Whether a run has nothing left to do, checked in milliseconds: nothing heavy is imported and no model is loaded.

A finished run leaves a hash of its settings and of the state of every file that they name, and a digest of a file that
each stage wrote. The same settings over the same files are the same run. After any change, each stage finds out itself
what is left to do.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from unlearning.store.files import digest, file_digest, read_state, write_atomically

MARK = ".finished"
NAMES = {  # settings that name no file, even if a file has this name
    *("concept", "others", "synonyms", "anchor", "template"),  # of datasets
    *("concepts", "initial", "prompts", "retained", "subjects", "templates", "words", "banned"),  # of methods, attacks
}
NAMES_IN_A_LIST = {"retain"}  # which is a folder if it is one text
LEFT = {  # by stage, a file that it writes
    "fit": "erasure/erasure.json",
    "attack": "erasure/erasure.json",
    "generate": "images/erased.csv",
    "evaluate": "metrics.json",
    "report": "report.html",
}


def state(settings: object) -> list[tuple[str, int, int]]:
    """(path, size in bytes, time of the last change in ns) of every file that a setting names.

    Of a folder, every file below it; of a repository on the Hugging Face hub, the files that say which version of it is
    in the local cache.
    """
    return sorted((str(path), (s := path.stat()).st_size, s.st_mtime_ns) for path in set(_files(settings)))


def _files(settings: object) -> Iterator[Path]:
    if isinstance(settings, Mapping | list):
        items = settings.items() if isinstance(settings, Mapping) else enumerate(settings)
        for name, value in items:
            if name not in NAMES and not (name in NAMES_IN_A_LIST and isinstance(value, list)):
                yield from _files(value)
    elif isinstance(settings, str) and settings.strip("./~"):
        if os.path.exists(there := os.path.expanduser(settings)):  # unlike Path.exists, it accepts any text
            path = Path(there)
            yield from (p for p in path.rglob("*") if p.is_file()) if path.is_dir() else (path,)
        elif re.fullmatch(r"[\w.-]+/[\w.-]+", settings):
            yield from _hub_versions(settings)


def _hub_versions(repository: str) -> Iterator[Path]:
    from huggingface_hub import constants

    refs = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}" / "refs"
    yield from (p for p in refs.rglob("*") if p.is_file())


def key(settings: Mapping, files: object) -> str:
    """A hash of all that a run leaves on disk depends on.

    Args:
        settings: All settings that decide what the run leaves.
        files: Those of the settings that may name files which the run reads.
    """
    return digest(settings, state(files))


def finished(folder: Path, key: str, stages: Sequence[str]) -> bool:
    """Whether `stages` have ended in `folder` with the settings of `key`, and their files are still what they were."""
    done = _read(folder / MARK, key)
    return done is not None and all(
        stage in done and done[stage] == _digest(folder, stage) is not None for stage in stages
    )


def finish(folder: Path, key: str, stages: Sequence[str]) -> None:
    """Records in `folder` that `stages` have ended with the settings of `key`."""
    left = {**(_read(folder / MARK, key) or {}), **{stage: _digest(folder, stage) for stage in stages}}
    write_atomically(folder / MARK, json.dumps({"key": key, "left": left}, indent=2))


def _read(mark: Path, key: str) -> dict[str, str] | None:
    """The digest of its file for each stage that has ended with the settings of `key`; None if none has."""
    return read_state(mark, lambda done: dict(done.get("left", {})) if done["key"] == key else None)


def _digest(folder: Path, stage: str) -> str | None:
    """A digest of the file that a stage writes, and of the size of tensors beside it; None without the file."""
    path = folder / LEFT[stage]
    if not path.is_file():
        return None
    tensors = [(beside.name, beside.stat().st_size) for beside in sorted(path.parent.glob("*.safetensors"))]
    return digest(file_digest(path), tensors)

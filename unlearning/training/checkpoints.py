"""Checkpoints of a fit, in a folder that is named by a digest of everything that the fit depends on."""

import functools
import hashlib
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.io import TorchCheckpointIO

from unlearning.erasures.base import path_of
from unlearning.store.files import digest, set_aside, write_atomically


class AtomicCheckpoints(TorchCheckpointIO):
    """Writes Lightning's checkpoints beside their target and renames them.

    Lightning itself writes them into TMPDIR first. Where that is on another file system, moving them is a copy, which a
    full disk interrupts.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(Path(path), functools.partial(torch.save, checkpoint))


def folder_of(trainer: pl.Trainer) -> Path | None:
    """The folder of a Trainer's checkpoints and of other state for resuming a fit; None without one."""
    keeper = trainer.checkpoint_callback
    return Path(keeper.dirpath) if keeper and keeper.dirpath else None


def keep_under(trainer: pl.Trainer, key: str) -> None:
    """Makes the Trainer keep its checkpoints in the subfolder `key`, so that no other fit resumes from them."""
    if folder := folder_of(trainer):
        trainer.checkpoint_callback.dirpath = str(folder / key)


def last(trainer: pl.Trainer) -> Path | None:
    """The checkpoint from which an interrupted fit resumes, if there is one. A damaged one is set aside."""
    folder = folder_of(trainer)
    path = folder / "last.ckpt" if folder else None
    return path if path and is_whole(path) else None


def is_whole(path: Path) -> bool:
    """Whether the file exists and is a complete file of torch.save. A damaged file is set aside."""
    if not path.exists():
        return False
    try:
        with ZipFile(path) as archive:
            damaged = archive.testzip()
    except (BadZipFile, EOFError, RuntimeError) as error:
        damaged = str(error) or repr(error)
    if damaged:
        set_aside(path, damaged)
    return not damaged


def key_of(*parts: object) -> str:
    """A digest of all that a fit depends on: objects by their classes and attributes, functions by their paths."""
    return digest([_described(part) for part in parts])


def _described(value: object) -> object:
    match value:
        case functools.partial():
            return [_described(value.func), _described(value.args), _described(value.keywords)]
        case None | bool() | int() | float() | str():
            return value
        case list() | tuple():
            return [_described(v) for v in value]
        case set() | frozenset():
            return sorted(map(repr, map(_described, value)))
        case torch.Tensor():
            return [str(value.dtype), _described(value.detach().cpu().float().numpy())]
        case np.ndarray():
            return [str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
        case dict():
            return {str(k): _described(v) for k, v in value.items()}
    if isinstance(protocol := getattr(value, "protocol", None), str):  # a sampler's: its batch size changes nothing
        return [path_of(type(value)), protocol]
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    own = {k: v for k, v in vars(value).items() if not k.startswith("_")} if hasattr(value, "__dict__") else str(value)
    return [path_of(type(value)), _described(own)]

"""Where an interrupted fit goes on: a folder of checkpoints for everything that the fit depends on."""

import functools
from pathlib import Path

import pytorch_lightning as pl

from unlearning.erasures.base import path_of
from unlearning.store.files import digest


def folder_of(trainer: pl.Trainer) -> Path | None:
    """The folder of a Trainer's checkpoints, and of what else an interrupted fit goes on from; None without one."""
    keeper = trainer.checkpoint_callback
    return Path(keeper.dirpath) if keeper and keeper.dirpath else None


def keep_under(trainer: pl.Trainer, key: str) -> None:
    """Makes the Trainer keep its checkpoints in a subfolder of their own, so that no other fit goes on from them."""
    if folder := folder_of(trainer):
        trainer.checkpoint_callback.dirpath = str(folder / key)


def last(trainer: pl.Trainer) -> Path | None:
    """The checkpoint from which an interrupted fit goes on, if there is one."""
    folder = folder_of(trainer)
    path = folder / "last.ckpt" if folder else None
    return path if path and path.exists() else None


def key_of(*parts: object) -> str:
    """A digest of all that a fit depends on: objects by their classes and attributes, functions by their paths."""
    return digest([_described(part) for part in parts])


def _described(value: object) -> object:
    match value:
        case functools.partial():
            return [_described(value.func), _described(value.args), _described(value.keywords)]
        case None | bool() | int() | float() | str():
            return value
        case list() | tuple() | set():
            return [_described(v) for v in value]
        case dict():
            return {str(k): _described(v) for k, v in value.items()}
    if callable(value) and hasattr(value, "__qualname__"):
        return f"{value.__module__}.{value.__qualname__}"
    own = {k: v for k, v in vars(value).items() if not k.startswith("_")} if hasattr(value, "__dict__") else str(value)
    return [path_of(type(value)), _described(own)]

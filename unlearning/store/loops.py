"""Loops that can be resumed after an interruption.

    with kept_in(folder):
        state = SimpleNamespace(v=v, optimizer=optimizer, losses=[])
        for i in resumed(range(iterations), "inverting", state):
            ...

The state and the random number generators are written to one file for each loop. Therefore the code in the block has
to begin its loops in the same order each time, and a loop may change nothing but its state. Code with checkpoints of
its own, such as a training, runs in `kept_in(None)`.
"""

import io
import itertools
import pickle
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar
from zipfile import BadZipFile

import torch
from torch import Tensor, nn
from tqdm import tqdm

from unlearning.store.files import set_aside, write_atomically

EVERY = 30.0  # seconds; a killed process loses what it has not written
T = TypeVar("T")
_paths: ContextVar[Iterator[Path] | None] = ContextVar("paths", default=None)


@contextmanager
def kept_in(folder: Path | None) -> Iterator[None]:
    """Keeps the state of the loops that begin in the block. When the block ends without an error, deletes the folder.

    Args:
        folder: Holds a file for each loop; None to keep nothing, even within another `kept_in`.
    """
    token = _paths.set((folder / f"{i}.pt" for i in itertools.count()) if folder else None)
    try:
        yield
    finally:
        _paths.reset(token)
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


def resumed(steps: Sequence[T], name: str, state: SimpleNamespace) -> Iterator[T]:
    """The steps of a loop, with a progress bar. Outside of `kept_in` all of them, else those that are left.

    Args:
        steps: The sequence that the loop runs over.
        name: The name of the progress bar.
        state: Everything that the loop changes: tensors, modules, optimizers, lists and numbers. Parameters, modules
            and optimizers are restored in place; anything else is replaced, so the loop has to read it from here.
    """
    paths = _paths.get()
    path = next(paths) if paths else None
    done = _restored(path, state) if path else 0
    written = time.monotonic()
    for i, step in enumerate(tqdm(steps[done:], name, initial=done, total=len(steps), leave=False), done + 1):
        yield step
        if path and (i == len(steps) or time.monotonic() > written + EVERY):
            _write(path, i, state)
            written = time.monotonic()


def _write(path: Path, done: int, state: SimpleNamespace) -> None:
    content = io.BytesIO()
    own = {name: v.state_dict() if hasattr(v, "state_dict") else v for name, v in vars(state).items()}
    random = [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [])]
    torch.save({"done": done, "state": own, "random": random}, content)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getbuffer())


@torch.no_grad()
def _restored(path: Path, state: SimpleNamespace) -> int:
    """Restores the state, if it was written; returns how many steps are done. A damaged file is set aside."""
    if not path.exists():
        return 0
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, BadZipFile, pickle.UnpicklingError) as error:
        set_aside(path, str(error).partition("\n")[0] or repr(error))
        return 0
    for name, value in saved["state"].items():
        own = getattr(state, name)
        if hasattr(own, "load_state_dict"):
            own.load_state_dict(value)
        elif isinstance(own, nn.Parameter):
            own.copy_(value)
        else:
            setattr(state, name, value.to(own.device) if isinstance(own, Tensor) else value)
    host, *devices = saved["random"]
    torch.set_rng_state(host)
    if devices and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(devices)
    return saved["done"]

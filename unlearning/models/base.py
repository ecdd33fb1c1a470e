"""What every model is, whatever it makes pictures of: a name, a digest of its weights, a network that erasure edits."""

import hashlib
import os
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from unlearning.store.files import digest

DType = Literal["float32", "bfloat16", "float16"]  # what a config may say of weights and of what is computed in


class Model(ABC):
    """
    Attributes:
        name, fingerprint: What it was loaded from, and a digest of the weights found there.
        dtype: Of its weights.
        autocast: What the networks compute in, where it is not that.
    """

    name: str
    fingerprint: str
    dtype: torch.dtype
    autocast: torch.dtype | None = None
    _device: torch.device

    @property
    @abstractmethod
    def network(self) -> nn.Module:
        """What erasure edits, and whose calls are counted."""

    @property
    def device(self) -> torch.device:
        return torch.device(self._device)

    @property
    def numerics(self) -> str:
        """What it computes in: pictures of one precision are not those of another."""
        return str(self.dtype) if self.autocast is None else f"{self.dtype}, {self.autocast}"

    def precision(self) -> AbstractContextManager:
        """Within it the networks compute in `autocast`, if there is one; their weights stay as they are.

        Without one, it is the Trainer's precision that counts, where there is a Trainer.
        """
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)


def chosen_device(device: str) -> torch.device:
    """ "auto" is the accelerator where there is one; of several, each process of a distributed run has its own."""
    if device != "auto":
        return torch.device(device)
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return torch.device(f"{accelerator.type}:{os.environ.get('LOCAL_RANK', 0)}" if accelerator else "cpu")


def fingerprint(folder: Path) -> str:
    """A digest of a file, or of the weights and configs below a folder: their names, and every byte of them."""
    files = sorted(p for p in folder.rglob("*") if p.suffix in (".safetensors", ".json", ".txt") and p.is_file())
    files = [folder] if folder.is_file() else files
    states = [(p, p.stat()) for p in files]
    return digest([(str(p.relative_to(folder)), _content(p.resolve(), s.st_size, s.st_mtime_ns)) for p, s in states])


@cache  # gigabytes are read once in a process, however many runs it makes
def _content(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

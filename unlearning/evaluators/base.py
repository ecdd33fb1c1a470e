"""What every evaluator is: a torchmetrics.Metric over pictures and their manifest rows, that states its protocol."""

import hashlib
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torchmetrics import Metric

from unlearning.concepts import UnlearningTask
from unlearning.errors import UserError
from unlearning.store.images import Row


class Evaluator(Metric):
    """Reads pictures, never the model. Subclasses write `update`, `compute`, `protocol` and `higher_is_better`.

    States are sums, so that several processes may each see a part of the pictures (`merge_state`); of a distributed run
    the first process sees them all, and waits for no other.

    Args:
        device: Where its networks and states live: "cpu", "cuda:1", ... or "auto", a GPU if there is one.
    """

    full_state_update = False
    higher_is_better: ClassVar[dict[str, bool]] = {}  # for every key that `compute` may give
    needs: ClassVar[str] = "other pictures"  # for the warning where it was asked for and `compute` gave nothing
    details: Sequence[dict] = ()  # what was found in each picture, if that is kept beside the numbers; as JSON has it
    failed: int = 0  # of the pictures since the last `reset`, those that it tripped over

    def __init__(self, device: str = "auto"):
        super().__init__(sync_on_compute=False)
        self.to(torch.device("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)

    def zeros(self, name: str, *shape: int) -> None:
        """Adds a state of float64 zeros that processes sum."""
        self.add_state(name, torch.zeros(shape, dtype=torch.float64, device=self.device), "sum")

    @property
    @abstractmethod
    def protocol(self) -> str:
        """All that its numbers depend on besides the pictures, in one line: detector, threshold, counting rule, ..."""

    def prepare(self, task: UnlearningTask) -> None:
        """What the numbers are measured against: called once, before the first `update`."""

    @abstractmethod
    def update(self, images: np.ndarray, rows: Sequence[Row]) -> None:
        """Takes a batch of pictures (B, H, W, 3) uint8 and their manifest rows."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """Numbers by `purpose/name`, the names being the field's: {"efficacy/acc_e": 3.5, ...}."""


def fingerprint(path: Path) -> str:
    """Twelve hexadecimal digits that stand for the content of a file: which weights a number was measured with."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def unknown(kind: str, given: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not among the `known` ones; it names the nearest of them."""
    known = list(known)
    near = get_close_matches(given, known, n=3, cutoff=0.4)
    meant = f" Did you mean {' or '.join(near)}?" if near else ""
    return UserError(f"Unknown {kind} {given!r}.{meant} Known: {', '.join(known)}.")

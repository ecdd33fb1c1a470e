"""The base class of evaluators: a torchmetrics.Metric over images and their manifest rows that states its protocol."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Protocol

import numpy as np
import torch
from torchmetrics import Metric

from unlearning.concepts import UnlearningTask
from unlearning.erasures.base import Erasure
from unlearning.models.base import Model, chosen_device
from unlearning.store.manifest import ManifestRow


class OracleMethod(Protocol):
    """A method that turns a run's model into the one to compare with: a model that never knew the concept."""

    def fit(self, model: Model, task: UnlearningTask) -> Erasure:
        """The erasure that turns `model` into it."""
        ...


class Evaluator(Metric):
    """Measures images; it never sees the model. Subclasses define `update`, `compute`, `protocol`, `higher_is_better`.

    States are sums, so that several processes may each see a part of the images (`merge_state`). In a distributed run
    the first process sees all of them and waits for no other.

    Args:
        device: The device of its networks and states: "cpu", "cuda:1", ... or "auto", a GPU if there is one.

    Attributes:
        higher_is_better: The direction of each number that `compute` may give and that has one.
        needs: What is missing if `compute` returns nothing, for the warning.
        details: A JSON object for each image, to be kept beside the numbers.
        version: Increased when its numbers for the same images change, so that stored ones are not reused.
        oracle: Gives the model whose images the numbers compare with; None if they compare with none.

    Raises:
        UserError: If there is no such device on this machine.
    """

    full_state_update = False
    higher_is_better: ClassVar[dict[str, bool]] = {}
    needs: ClassVar[str] = "other images"
    details: Sequence[dict] = ()
    version: ClassVar[int] = 1
    oracle: OracleMethod | None = None

    def __init__(self, device: str = "auto"):
        super().__init__(sync_on_compute=False)
        there = "cuda" if torch.cuda.is_available() else "cpu"  # Apple's has no float64, which states have
        self.to(chosen_device(there if device == "auto" else device))

    def zeros(self, name: str, *shape: int) -> None:
        """Adds a float64 state that starts at zero and is summed over processes."""
        self.add_state(name, torch.zeros(shape, dtype=torch.float64, device=self.device), "sum")

    @property
    def failed(self) -> int:
        """The number of images on which it has failed since the last `reset`."""
        return 0

    @property
    @abstractmethod
    def protocol(self) -> str:
        """All that its numbers depend on besides the images, in one line: detector, threshold, counting rule, ..."""

    def prepare(self, task: UnlearningTask) -> None:
        """Sets what the numbers are measured against. Called once, before the first `update`."""

    @abstractmethod
    def update(self, images: np.ndarray, rows: Sequence[ManifestRow]) -> None:
        """Takes a batch of images (B, H, W, 3) uint8 and their manifest rows."""

    @abstractmethod
    def compute(self) -> dict[str, float]:
        """The numbers by `purpose/name`, with the names of the literature: {"efficacy/acc_e": 3.5, ...}."""

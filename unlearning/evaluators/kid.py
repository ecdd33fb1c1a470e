"""Kernel distance between the features of generated and of real pictures (Binkowski et al., ICLR 2018), by clean-fid.

Unlike an FID it has no bias that falls with the number of pictures: it may be taken of few.
"""

# B batch, F features.
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from cleanfid.fid import kernel_distance
from torch import Tensor

from unlearning.concepts import RETAIN, UnlearningTask
from unlearning.errors import UserError
from unlearning.evaluators import references
from unlearning.evaluators.base import Evaluator
from unlearning.evaluators.fid import Features
from unlearning.store.images import Row


class KID(Evaluator):
    """KID of the retained concepts' pictures. Features are kept, 8 KB a picture of Inception's.

    Args:
        features: Makes features of pictures.
        count: Real pictures of the task to measure against.
        real: A folder of real pictures to measure against instead, with all it holds.
        subsets, subset_size: clean-fid's: the distance is a mean over so many random subsets, always the same.

    Raises:
        UserError: If there is no such folder.
    """

    needs: ClassVar[str] = (
        "two pictures, and two real ones of what the retained prompts ask for: evaluator.kid.real=/a/folder"
    )
    higher_is_better: ClassVar[dict[str, bool]] = {"fidelity/kid": False}

    def __init__(
        self,
        features: Features,
        count: int = 1000,
        real: str | Path | None = None,
        subsets: int = 100,
        subset_size: int = 1000,
        device: str = "auto",
    ):
        super().__init__(device)
        self.features, self.count, self.subsets, self.subset_size = features, count, subsets, subset_size
        self.given = Path(real).expanduser() if real else None
        if self.given and not self.given.is_dir():
            raise UserError(f"There is no folder {self.given} of real pictures to measure against.")
        self._reference: references.Reference | None = None
        self.add_state("generated", [], "cat")

    @property
    def protocol(self) -> str:
        real = self._reference.name if self._reference else "0 real"
        subsets = f"{self.subsets} subsets of at most {self.subset_size}"
        return f"clean-fid {version('clean-fid')} on {self.features.name}, {subsets}; retained pictures to {real}"

    def prepare(self, task: UnlearningTask) -> None:
        self._reference = (
            references.of_folder(self.given) if self.given else references.of_task(task, RETAIN, self.count)
        )

    def update(self, images: np.ndarray, rows: Sequence[Row]) -> None:
        asked = [i for i, row in enumerate(rows) if row.role == RETAIN]
        if asked:
            self.generated.append(self._extract(images[asked]))

    def compute(self) -> dict[str, float]:
        generated = torch.cat(self.generated) if self.generated else torch.empty(0)
        if self._reference is None or len(generated) < 2:
            return {}
        real = torch.cat([self._extract(batch) for batch in self._reference.batches()])
        if len(real) < 2:
            return {}
        state = np.random.get_state()  # which clean-fid draws its subsets from
        try:
            np.random.seed(0)
            distance = kernel_distance(real.numpy(), generated.numpy(), self.subsets, self.subset_size)
        finally:
            np.random.set_state(state)
        return {"fidelity/kid": distance}

    def _extract(self, images: np.ndarray) -> Tensor:
        return self.features(torch.as_tensor(images, device=self.device)).double().cpu()

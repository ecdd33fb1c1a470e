"""Kernel distance between the features of generated and real images (Binkowski et al., ICLR 2018), by clean-fid.

Unlike FID, KID is unbiased: its expectation does not depend on the number of images, and it works with few.
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
from unlearning.config.values import Count, Several
from unlearning.data import references
from unlearning.errors import UserError
from unlearning.evaluators.base import Evaluator
from unlearning.evaluators.fid import Features
from unlearning.store.manifest import ManifestRow


class KID(Evaluator):
    """KID of the retained concepts' images. Features are stored: 8 KB an image with Inception.

    Args:
        features: Maps images to features.
        count: How many of the task's real images to measure against.
        real: A folder of real images to measure against in place of the task's; all its images are used.
        subsets, subset_size: clean-fid's. The distance is the mean over random subsets, which are always the same.

    Raises:
        UserError: If the folder does not exist.
    """

    needs: ClassVar[str] = (
        "two generated images, and two real images of what the retained prompts ask for: evaluator.kid.real=/a/folder"
    )
    higher_is_better: ClassVar[dict[str, bool]] = {"fidelity/kid": False}

    def __init__(
        self,
        features: Features,
        count: Several = 1000,
        real: str | Path | None = None,
        subsets: Count = 100,
        subset_size: Several = 1000,
        device: str = "auto",
    ):
        super().__init__(device)
        self.features, self.count, self.subsets, self.subset_size = features, count, subsets, subset_size
        self.given = Path(real).expanduser() if real else None
        if self.given and not self.given.is_dir():
            raise UserError(f"There is no folder {self.given}. Set `evaluator.kid.real` to a folder of real images.")
        if self.given:
            references.check(self.given)  # before anything is generated
        self._reference: references.Reference | None = None
        self.add_state("generated", [], "cat")

    @property
    def protocol(self) -> str:
        real = self._reference.name if self._reference else "0 real"
        subsets = f"{self.subsets} subsets of at most {self.subset_size}"
        return f"clean-fid {version('clean-fid')} on {self.features.name}, {subsets}; retained images to {real}"

    def prepare(self, task: UnlearningTask) -> None:
        self._reference = (
            references.of_folder(self.given) if self.given else references.of_task(task, RETAIN, self.count)
        )

    def update(self, images: np.ndarray, rows: Sequence[ManifestRow]) -> None:
        chosen = [i for i, row in enumerate(rows) if row.role == RETAIN]
        if chosen:
            self.generated.append(self._extract(images[chosen]))

    def compute(self) -> dict[str, float]:
        generated = torch.cat(self.generated) if self.generated else torch.empty(0)
        if self._reference is None or len(generated) < 2:
            return {}
        real = torch.cat([self._extract(batch) for batch in self._reference.batches()])
        if len(real) < 2:
            return {}
        state = np.random.get_state()  # clean-fid draws its subsets with numpy's global generator
        try:
            np.random.seed(0)
            distance = kernel_distance(real.numpy(), generated.numpy(), self.subsets, self.subset_size)
        finally:
            np.random.set_state(state)
        return {"fidelity/kid": distance}

    def _extract(self, images: np.ndarray) -> Tensor:
        return self.features(torch.as_tensor(images, device=self.device)).double().cpu()

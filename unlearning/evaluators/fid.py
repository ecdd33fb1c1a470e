"""Fréchet distance between the features of generated and of real pictures (Heusel et al., NeurIPS 2017), by clean-fid.

clean-fid: Parmar et al., CVPR 2022. Its resizing and its distance are used as they are, on features that are summed up
batch by batch instead of kept.
"""

# B batch, F features, R roles.
import hashlib
import warnings
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from cleanfid.downloads_helper import inception_url
from cleanfid.fid import frechet_distance
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from torch import Tensor

from unlearning.concepts import ERASE, RETAIN, UnlearningTask, UserError
from unlearning.evaluators.base import Evaluator, fingerprint, unknown
from unlearning.images import Row

KEYS = {RETAIN: "fidelity/fid", ERASE: "fidelity/fid_e"}
BATCH = 64  # real pictures that go through the extractor at once


class Features(Protocol):
    """Pictures (B, H, W, 3) uint8 to features (B, F), on their device. `name` tells its weights and its resizing."""

    name: str

    def __call__(self, images: Tensor) -> Tensor: ...


class Inception:
    """The Inception of Heusel et al. as clean-fid runs it: pictures resized to 299 by PIL's antialiased bicubic filter.

    Args:
        path: clean-fid's file inception-2015-12-05.pt, or its folder; by default where clean-fid itself keeps it.

    Raises:
        UserError: If it is not there. Nothing is downloaded.
    """

    def __init__(self, path: str | Path | None = None):
        file = Path(inception_url).name
        path = Path(path or "/tmp")  # hard-coded in clean-fid
        folder = path.parent if path.name == file else path
        if not (folder / file).is_file():
            raise UserError(
                f"No {file} in {folder}. Download it from {inception_url} (96 MB), and name its folder by "
                "`judge.features.path`; or measure in the embedded world's features: `judge=emoji`."
            )
        self.network = InceptionV3W(str(folder), download=False).eval()
        self.resize = build_resizer("clean")
        self.name = f"Inception {fingerprint(folder / file)}, mode clean"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        images = torch.as_tensor(images)
        resized = torch.from_numpy(np.stack([self.resize(image) for image in images.cpu().numpy()]))
        return self.network.to(images.device)(resized.permute(0, 3, 1, 2).to(images.device))


class FID(Evaluator):
    """FID of the retained concepts' pictures, and how far the erased prompts' pictures are from the concept's own.

    Args:
        features: Makes features of pictures.
        roles: The roles that are measured, each against real pictures of the same role.
        count: Real pictures to measure against. An FID falls as its counts grow: compare only what shares both.

    Raises:
        UserError: For an unknown role.
    """

    higher_is_better: ClassVar[dict[str, bool]] = {"fidelity/fid": False, "fidelity/fid_e": True}

    def __init__(
        self, features: Features, roles: Sequence[str] = (RETAIN, ERASE), count: int = 1000, device: str = "auto"
    ):
        super().__init__(device)
        for role in roles:
            if role not in KEYS:
                raise unknown("role", role, KEYS)
        self.features, self.roles, self.count = features, tuple(roles), count
        self._real: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        self._named: dict[str, str] = {}  # a digest of each role's real pictures
        self._generated: list[float] = []
        width = self._extract(np.zeros((1, 64, 64, 3), np.uint8)).shape[1]
        self.zeros("counts", len(self.roles))
        self.zeros("sums", len(self.roles), width)
        self.zeros("products", len(self.roles), width, width)

    def reset(self) -> None:
        super().reset()
        self._generated = []

    @property
    def protocol(self) -> str:
        """Its counts of generated pictures are those of the last `compute` since the last `reset`."""
        real = [int(self._real[role][0]) if role in self._real else 0 for role in self.roles]
        generated = map(int, self._generated or [0] * len(self.roles))
        named = [f" ({self._named[role]})" if role in self._named else "" for role in self.roles]
        counts = ", ".join(
            f"{r} {g} to {n} real{d}" for r, g, n, d in zip(self.roles, generated, real, named, strict=True)
        )
        return f"clean-fid {version('clean-fid')} on {self.features.name}; pictures: {counts}"

    def prepare(self, task: UnlearningTask) -> None:
        """Takes `count` real pictures of each role that the task has references for."""
        for role in self.roles:
            images = task.references[role](self.count) if role in task.references else ()
            if len(images):  # a folder may have none to spare
                self._named[role] = hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()[:8]
                batches = (np.stack(images[i : i + BATCH]) for i in range(0, len(images), BATCH))
                self._real[role] = tuple(map(sum, zip(*map(self._moments, batches), strict=True)))

    def update(self, images: np.ndarray, rows: Sequence[Row]) -> None:
        for i, role in enumerate(self.roles):
            asked = [j for j, row in enumerate(rows) if row.role == role]
            if asked:
                count, total, product = self._moments(images[asked])
                self.counts[i] += count
                self.sums[i] += total
                self.products[i] += product

    def compute(self) -> dict[str, float]:
        self._generated, numbers = self.counts.tolist(), {}
        for role, *generated in zip(self.roles, self.counts, self.sums, self.products, strict=True):
            real = self._real.get(role)
            if real and min(real[0], generated[0]) >= 2:
                numbers[KEYS[role]] = _distance(_gaussian(*real), _gaussian(*generated))
        return numbers

    def _extract(self, images: np.ndarray) -> Tensor:
        return self.features(torch.as_tensor(images, device=self.device)).double()

    def _moments(self, images: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """The number of pictures, the sum of their features x (F,), and that of x xᵀ (F, F)."""
        x = self._extract(images)
        return x.new_tensor(len(x)), x.sum(0), x.T @ x


def _gaussian(count: Tensor, total: Tensor, product: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean (F,) and unbiased covariance (F, F)."""
    mean = total / count
    return mean.cpu().numpy(), ((product - count * mean.outer(mean)) / (count - 1)).cpu().numpy()


def _distance(real: tuple[np.ndarray, np.ndarray], generated: tuple[np.ndarray, np.ndarray]) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # clean-fid's sqrtm(disp=...)
        # The square root of a singular product may leave a distance of nothing a little below zero.
        return max(0.0, float(frechet_distance(*real, *generated)))

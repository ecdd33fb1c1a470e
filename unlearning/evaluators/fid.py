"""Fréchet distance between the features of generated and real images (Heusel et al., NeurIPS 2017), by clean-fid.

clean-fid (Parmar et al., CVPR 2022) provides the resizing and the distance. The features are summed batch by batch and
not stored. If many runs are measured against the same real images, compute their statistics once:

    python -m unlearning.evaluators.fid /the/folder/of/val2014 coco.npz      # then evaluator.fid.real=coco.npz
"""

# B batch, F features, R roles.
import argparse
import io
import sys
import warnings
from collections.abc import Callable, Sequence
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from cleanfid.fid import frechet_distance
from scipy.linalg import LinAlgWarning
from torch import Tensor

from unlearning.concepts import ERASE, RETAIN, UnlearningTask
from unlearning.config.values import Several
from unlearning.data import references
from unlearning.errors import UserError, unknown
from unlearning.evaluators.base import Evaluator
from unlearning.judges.inception import MODES, Inception
from unlearning.store.files import file_digest, write_atomically
from unlearning.store.manifest import ManifestRow

KEYS = {RETAIN: "fidelity/fid", ERASE: "fidelity/fid_e"}
Gaussian = tuple[np.ndarray, np.ndarray]  # mean (F,) and covariance (F, F)
Moments = tuple[Tensor, Tensor, Tensor]


class Features(Protocol):
    """Maps images (B, H, W, 3) uint8 to features (B, F), on their device. `name` identifies weights and resizing."""

    name: str

    def __call__(self, images: Tensor) -> Tensor: ...


class FID(Evaluator):
    """FID of the retained concepts' images, and the distance of the erased prompts' images from the concept's own.

    Args:
        features: Maps images to features.
        roles: The roles to measure, each against real images of the same role.
        count: How many of the task's real images to measure against. An FID falls as the numbers of images grow:
            compare only FIDs of equal numbers.
        real: Real images for the retained concepts, in place of the task's: a folder, of which all images are used, or
            an .npz with `mu` and `sigma` of these features, as clean-fid and pytorch-fid write it. The command of this
            module adds the `extractor`; the protocol marks a file without it.

    Raises:
        UserError: For an unknown role; if `real` is neither a folder nor an .npz, or its extractor is another one.
    """

    needs: ClassVar[str] = (
        "two generated images, and two real images of what the retained prompts ask for: evaluator.fid.real=/a/folder"
    )
    higher_is_better: ClassVar[dict[str, bool]] = {"fidelity/fid": False, "fidelity/fid_e": True}

    def __init__(
        self,
        features: Features,
        roles: Sequence[str] = (RETAIN, ERASE),
        count: Several = 1000,
        real: str | Path | None = None,
        device: str = "auto",
    ):
        super().__init__(device)
        for role in roles:
            if role not in KEYS:
                raise unknown("role", role, KEYS)
        self.features, self.roles, self.count = features, tuple(roles), count
        self.width = width(features, self.device)
        self.given = Path(real).expanduser() if real else None
        if self.given and not self.given.exists():
            raise UserError(
                f"There is no {self.given}. Set `evaluator.fid.real` to a folder of real images, or to the .npz of "
                "their statistics."
            )
        if self.given and self.given.is_dir():
            references.check(self.given)  # before anything is generated
        self._statistics = (
            self._read(self.given) if self.given and self.given.is_file() and RETAIN in self.roles else None
        )
        self._real: dict[str, Callable[[], Gaussian | None]] = {}
        self._names: dict[str, str] = {}  # of the real images of each role
        self._generated: list[float] = []
        self.zeros("counts", len(self.roles))
        self.zeros("sums", len(self.roles), self.width)
        self.zeros("products", len(self.roles), self.width, self.width)

    def reset(self) -> None:
        super().reset()
        self._generated = []

    @property
    def protocol(self) -> str:
        """States the numbers of generated images of the last `compute`; 0 after a `reset`."""
        generated = map(int, self._generated or [0] * len(self.roles))
        counts = ", ".join(
            f"{role} {n} to {self._names.get(role, '0 real')}" for role, n in zip(self.roles, generated, strict=True)
        )
        return f"clean-fid {version('clean-fid')} on {self.features.name}; images: {counts}"

    def prepare(self, task: UnlearningTask) -> None:
        """Chooses the real images of each role. Their features are extracted when a number needs them, once."""
        for role in self.roles:
            if role == RETAIN and self._statistics:
                self._names[role], self._real[role] = self._statistics
                continue
            given = references.of_folder(self.given) if role == RETAIN and self.given else None
            reference = given or references.of_task(task, role, self.count)
            if reference is None:
                self._names.pop(role, None), self._real.pop(role, None)  # may be those of another task
            elif reference.name != self._names.get(role):
                self._names[role] = reference.name
                self._real[role] = cache(partial(self._gaussian_of, reference))

    def _read(self, path: Path) -> tuple[str, Callable[[], Gaussian]]:
        """The name of given statistics, and a function that returns them."""
        given, stated = _read_statistics(path, self.features.name, self.width)
        unstated = "" if stated else " by an extractor that it does not name"
        return f"{path.name} ({file_digest(path)[:8]}){unstated}", partial(_same, given)

    def update(self, images: np.ndarray, rows: Sequence[ManifestRow]) -> None:
        for i, role in enumerate(self.roles):
            chosen = [j for j, row in enumerate(rows) if row.role == role]
            if chosen:
                add((self.counts, self.sums, self.products), i, self._moments(images[chosen]))

    def compute(self) -> dict[str, float]:
        self._generated, numbers = self.counts.tolist(), {}
        for role, *generated in zip(self.roles, self.counts, self.sums, self.products, strict=True):
            if generated[0] >= 2 and role in self._real and (real := self._real[role]()):
                numbers[KEYS[role]] = distance(real, gaussian(*generated))
        return numbers

    def _gaussian_of(self, reference: references.Reference) -> Gaussian | None:
        """The Gaussian of the real images; None for a single image."""
        parts = zip(*map(self._moments, reference.batches()), strict=True)
        count, total, product = (torch.stack(part).sum(0) for part in parts)
        return gaussian(count, total, product) if count >= 2 else None

    def _moments(self, images: np.ndarray) -> Moments:
        return moments(self.features, torch.as_tensor(images, device=self.device))


def width(features: Features, device: torch.device) -> int:
    """F, the number of features."""
    return features(torch.zeros(1, 64, 64, 3, dtype=torch.uint8, device=device)).shape[1]


def moments(features: Features, images: Tensor) -> Moments:
    """The number of images (B, H, W, 3) uint8, the sum of their features x (F,), and the sum of x xᵀ (F, F)."""
    x = features(images).double()
    return x.new_tensor(len(x)), x.sum(0), x.T @ x


def add(states: Moments, place: int | tuple[int, ...], sums: Moments) -> None:
    """Adds the sums of a batch to those at a place of states that have one for each place."""
    for state, sum_ in zip(states, sums, strict=True):
        state[place] += sum_


def gaussian(count: Tensor, total: Tensor, product: Tensor) -> Gaussian:
    """Mean and unbiased covariance, from sums."""
    mean = total / count
    return mean.cpu().numpy(), ((product - count * mean.outer(mean)) / (count - 1)).cpu().numpy()


def _same(gaussian: Gaussian) -> Gaussian:
    return gaussian


def _read_statistics(path: Path, extractor: str, width: int) -> tuple[Gaussian, bool]:
    """The Gaussian in an .npz, and whether the file names its extractor.

    Raises:
        UserError: If the file has no statistics, another number of features, or names another extractor.
    """
    try:
        with np.load(path) as file:
            mean, covariance = file["mu"], file["sigma"]
            stated = str(file["extractor"]) if "extractor" in file else None
    except Exception as error:  # a foreign file can fail in any way
        raise UserError(
            f"{path} holds no statistics for an FID, an array `mu` and an array `sigma`: {error}"
        ) from error
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise UserError(f"{path} has statistics of {mean.size} features, but the extractor gives {width}.")
    if stated not in (None, extractor):
        raise UserError(
            f"{path} has statistics of {stated}, but the run uses {extractor}. Choose that extractor with "
            "`judge.features`, or compute the statistics again: python -m unlearning.evaluators.fid --help."
        )
    return (mean, covariance), stated is not None


def distance(real: Gaussian, generated: Gaussian) -> float:
    """Fréchet's."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # clean-fid's sqrtm(disp=...)
        warnings.simplefilter("ignore", LinAlgWarning)  # a singular product, of few images
        # The square root of a singular product can make a distance of 0 slightly negative. With the arguments in this
        # order, max keeps NaN.
        return max(float(frechet_distance(*real, *generated)), 0.0)


def main() -> None:
    """The command: writes the statistics of a folder of real images."""
    parser = argparse.ArgumentParser(
        prog="python -m unlearning.evaluators.fid",
        description="Computes the statistics mu and sigma of a folder of real images, to measure runs against.",
    )
    parser.add_argument("folder", type=Path, help="real images")
    parser.add_argument("file", type=Path, help="the .npz to write")
    parser.add_argument("--inception", type=Path, help="folder of inception-2015-12-05.pt (default: /tmp)")
    parser.add_argument("--mode", default="clean", help=f"{' or '.join(MODES)} (default: clean)")
    arguments = parser.parse_args()
    try:
        fid = FID(Inception(arguments.inception, arguments.mode))
        gaussian = fid._gaussian_of(references.of_folder(arguments.folder))
        if gaussian is None:
            raise UserError(f"{arguments.folder} holds a single image; a covariance needs two.")
        np.savez(buffer := io.BytesIO(), mu=gaussian[0], sigma=gaussian[1], extractor=fid.features.name)
        write_atomically(arguments.file.with_suffix(".npz"), buffer.getvalue())
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

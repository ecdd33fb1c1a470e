"""Fréchet distance between the features of generated and of real pictures (Heusel et al., NeurIPS 2017), by clean-fid.

clean-fid: Parmar et al., CVPR 2022. Its resizing and its distance are used as they are, on features that are summed up
batch by batch instead of kept. Real pictures that many runs are measured against are gone through once by

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
from cleanfid.downloads_helper import inception_url
from cleanfid.fid import frechet_distance
from cleanfid.inception_torchscript import InceptionV3W
from cleanfid.resize import build_resizer
from torch import Tensor

from unlearning.concepts import ERASE, RETAIN, UnlearningTask
from unlearning.errors import UserError
from unlearning.evaluators import references
from unlearning.evaluators.base import Evaluator, fingerprint, unknown
from unlearning.store.files import write_atomically
from unlearning.store.images import Row

KEYS = {RETAIN: "fidelity/fid", ERASE: "fidelity/fid_e"}
MODES = ("clean", "legacy_tensorflow")
Gaussian = tuple[np.ndarray, np.ndarray]  # mean (F,) and covariance (F, F)


class Features(Protocol):
    """Pictures (B, H, W, 3) uint8 to features (B, F), on their device. `name` tells its weights and its resizing."""

    name: str

    def __call__(self, images: Tensor) -> Tensor: ...


class Inception:
    """The Inception of Heusel et al. as clean-fid runs it.

    Args:
        path: clean-fid's file inception-2015-12-05.pt, or its folder; by default where clean-fid itself keeps it.
        mode: clean-fid's name of how pictures become 299 pixels wide: "clean", by PIL's antialiased bicubic filter, or
            "legacy_tensorflow", by the network itself, as FIDs were before clean-fid. ("legacy_pytorch" has weights of
            its own, which clean-fid reads from no other place than the network's.)

    Raises:
        UserError: For an unknown mode, or if the file is not there. Nothing is downloaded.
    """

    def __init__(self, path: str | Path | None = None, mode: str = "clean"):
        if mode not in MODES:
            raise unknown("mode of clean-fid", mode, MODES)
        file = Path(inception_url).name
        path = Path(path or "/tmp")  # hard-coded in clean-fid
        folder = path.parent if path.name == file else path
        if not (folder / file).is_file():
            raise UserError(
                f"No {file} in {folder}. Download it from {inception_url} (96 MB), and name its folder by "
                "`judge.features.path`; or measure in the embedded world's features: `judge=emoji`."
            )
        self.network = InceptionV3W(str(folder), download=False, resize_inside=mode == "legacy_tensorflow").eval()
        self.resize = build_resizer(mode)
        self.name = f"Inception {fingerprint(folder / file)}, mode {mode}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        images = torch.as_tensor(images)
        resized = torch.from_numpy(np.stack([self.resize(image) for image in images.cpu().numpy()]))
        return self.network.to(images.device)(resized.permute(0, 3, 1, 2).float().to(images.device))


class FID(Evaluator):
    """FID of the retained concepts' pictures, and how far the erased prompts' pictures are from the concept's own.

    Args:
        features: Makes features of pictures.
        roles: The roles that are measured, each against real pictures of the same role.
        count: Real pictures of the task to measure against. An FID falls as its counts grow: compare only what shares
            both.
        real: What retained concepts are measured against instead: a folder, with all its pictures, or statistics of
            one in these features, the `mu` and `sigma` of an .npz as clean-fid and pytorch-fid write it. What this
            module's command writes names its `extractor` too; of a file that does not, the protocol says so.

    Raises:
        UserError: For an unknown role, or for a `real` that is neither, or by another extractor.
    """

    needs: ClassVar[str] = (
        "two pictures, and two real ones of what the retained prompts ask for: evaluator.fid.real=/a/folder"
    )
    higher_is_better: ClassVar[dict[str, bool]] = {"fidelity/fid": False, "fidelity/fid_e": True}

    def __init__(
        self,
        features: Features,
        roles: Sequence[str] = (RETAIN, ERASE),
        count: int = 1000,
        real: str | Path | None = None,
        device: str = "auto",
    ):
        super().__init__(device)
        for role in roles:
            if role not in KEYS:
                raise unknown("role", role, KEYS)
        self.features, self.roles, self.count = features, tuple(roles), count
        self.width = self._extract(np.zeros((1, 64, 64, 3), np.uint8)).shape[1]
        self.given = Path(real).expanduser() if real else None
        if self.given and not self.given.exists():
            raise UserError(
                f"There is no {self.given}: `real` is a folder of real pictures, or the .npz of its statistics."
            )
        self._real: dict[str, Callable[[], Gaussian | None]] = {}
        self._named: dict[str, str] = {}
        self._generated: list[float] = []
        self.zeros("counts", len(self.roles))
        self.zeros("sums", len(self.roles), self.width)
        self.zeros("products", len(self.roles), self.width, self.width)

    def reset(self) -> None:
        super().reset()
        self._generated = []

    @property
    def protocol(self) -> str:
        """Its counts of generated pictures are those of the last `compute` since the last `reset`."""
        generated = map(int, self._generated or [0] * len(self.roles))
        counts = ", ".join(
            f"{role} {n} to {self._named.get(role, '0 real')}" for role, n in zip(self.roles, generated, strict=True)
        )
        return f"clean-fid {version('clean-fid')} on {self.features.name}; pictures: {counts}"

    def prepare(self, task: UnlearningTask) -> None:
        """Names what each role is measured against; its features are taken where a number asks for them, and once."""
        for role in self.roles:
            if role == RETAIN and self.given and self.given.is_file():
                gaussian, stated = _statistics(self.given, self.features.name, self.width)
                unstated = "" if stated else " by an extractor that it does not name"
                self._named[role] = f"{self.given.name} ({fingerprint(self.given)[:8]}){unstated}"
                self._real[role] = lambda gaussian=gaussian: gaussian
                continue
            given = references.of_folder(self.given) if role == RETAIN and self.given else None
            reference = given or references.of_task(task, role, self.count)
            if reference is None:
                self._named.pop(role, None), self._real.pop(role, None)  # those of another task
            elif reference.name != self._named.get(role):
                self._named[role] = reference.name
                self._real[role] = cache(partial(self._gaussian_of, reference))

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
            if generated[0] >= 2 and role in self._real and (real := self._real[role]()):
                numbers[KEYS[role]] = _distance(real, _gaussian(*generated))
        return numbers

    def _gaussian_of(self, reference: references.Reference) -> Gaussian | None:
        """None of a single picture."""
        moments = tuple(map(sum, zip(*map(self._moments, reference.batches()), strict=True)))
        return _gaussian(*moments) if moments[0] >= 2 else None

    def _extract(self, images: np.ndarray) -> Tensor:
        return self.features(torch.as_tensor(images, device=self.device)).double()

    def _moments(self, images: np.ndarray) -> tuple[Tensor, Tensor, Tensor]:
        """The number of pictures, the sum of their features x (F,), and that of x xᵀ (F, F)."""
        x = self._extract(images)
        return x.new_tensor(len(x)), x.sum(0), x.T @ x


def _gaussian(count: Tensor, total: Tensor, product: Tensor) -> Gaussian:
    """The covariance is the unbiased one."""
    mean = total / count
    return mean.cpu().numpy(), ((product - count * mean.outer(mean)) / (count - 1)).cpu().numpy()


def _statistics(path: Path, extractor: str, width: int) -> tuple[Gaussian, bool]:
    """Of an .npz, and whether it names this extractor.

    Raises UserError if it holds none, none of so many features, or names another.
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
        raise UserError(f"{path} has statistics of {mean.size} features; an extractor of {width} is asked for.")
    if stated not in (None, extractor):
        raise UserError(
            f"{path} has statistics by {stated}; by {extractor} they are asked for: name that by `judge.features`, or "
            "write them anew, python -m unlearning.evaluators.fid --help."
        )
    return (mean, covariance), stated is not None


def _distance(real: Gaussian, generated: Gaussian) -> float:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # clean-fid's sqrtm(disp=...)
        # The square root of a singular product may leave a distance of nothing a little below zero. In this order the
        # maximum of what is no number is no number.
        return max(float(frechet_distance(*real, *generated)), 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m unlearning.evaluators.fid",
        description="Writes the statistics of a folder of real pictures, mu and sigma, to measure runs against.",
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("file", type=Path, help="an .npz")
    parser.add_argument("--inception", type=Path, help="the folder of inception-2015-12-05.pt; /tmp unless given")
    parser.add_argument("--mode", default="clean", help=" or ".join(MODES))
    asked = parser.parse_args()
    try:
        fid = FID(Inception(asked.inception, asked.mode))
        gaussian = fid._gaussian_of(references.of_folder(asked.folder))
        if gaussian is None:
            raise UserError(f"{asked.folder} holds a single picture, which has no covariance.")
        np.savez(buffer := io.BytesIO(), mu=gaussian[0], sigma=gaussian[1], extractor=fid.features.name)
        write_atomically(asked.file.with_suffix(".npz"), buffer.getvalue())
    except UserError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()

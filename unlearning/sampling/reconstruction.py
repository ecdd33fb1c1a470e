"""Reconstruction of input images: the counterpart of sampling for image-to-image models."""

# B batch, H W height and width.
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from unlearning.concepts import ERASE, SYNONYM
from unlearning.config.values import Count
from unlearning.models.vqgan import VQGAN
from unlearning.store.manifest import ManifestRow, load_images, manifest_of_inputs

FAILED = "failed"  # the key under which a decision says why an image could not be generated


@dataclass(frozen=True)
class Reconstruction:
    """Reconstructs input images.

    Args:
        batch_size: Number of images in one batch. It changes no image.
    """

    batch_size: Count = 16
    automatic: ClassVar[bool] = False  # see Sampler

    manifest = staticmethod(manifest_of_inputs)

    @property
    def protocol(self) -> str:
        """All that its images depend on, besides model and input, as text."""
        return "codes of the nearest vectors, decoded"

    def check(self, model: VQGAN, rows: Sequence[ManifestRow]) -> None:
        """Accepts all rows."""

    @torch.no_grad()
    def draw(self, model: VQGAN, rows: Sequence[ManifestRow]) -> tuple[Tensor, list[dict]]:
        """The reconstructed inputs of a manifest's rows, (B, 3, H, W) in [0, 1], and what was replaced in each."""
        images = load_images(rows, "source")
        codes = model.encode(as_tensor(images))
        decided: list[dict] = [{} for _ in rows]
        if model.edit is not None:
            boxes = [[r.box for r in row.regions if r.role in (ERASE, SYNONYM)] for row in rows]
            known = [b if row.regions else None for b, row in zip(boxes, rows, strict=True)]
            codes, decided = model.edit(images, codes, known, [row.seed for row in rows])
        return model.decode(codes), decided


def as_tensor(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 to (B, 3, H, W) in [0, 1]."""
    return torch.tensor(images).permute(0, 3, 1, 2) / 255  # a copy: some arrays may not be written to

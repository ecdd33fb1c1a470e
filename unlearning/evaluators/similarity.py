"""PSNR and SSIM (Wang et al., 2004) against the unedited model's image, outside the erased regions."""

# B batch, H W height and width.
from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from unlearning.concepts import RETAIN
from unlearning.evaluators.base import Evaluator
from unlearning.store.manifest import ManifestRow, load_images


class Similarity(Evaluator):
    """Mean PSNR and SSIM over images, each against the unedited model's image of the same row.

    The regions of the erased concept are left out. Rows without an unedited image are skipped, and so are rows without
    regions whose role is not "retain": their whole image is about the concept.
    """

    needs: ClassVar[str] = "an erasure that changes images, and something in them that should stay"
    higher_is_better: ClassVar[dict[str, bool]] = {"fidelity/psnr": True, "fidelity/ssim": True}

    def __init__(self, device: str = "auto"):
        super().__init__(device)
        self.zeros("psnr")
        self.zeros("ssim")
        self.zeros("count")

    @property
    def protocol(self) -> str:
        return "against the unedited model's image, outside the erased regions; PSNR of at most 60 dB, SSIM 11 × 11"

    def update(self, images: np.ndarray, rows: Sequence[ManifestRow]) -> None:
        for i, row in enumerate(rows):
            if row.base and (row.regions or row.role == RETAIN):
                psnr, ssim = self.of(images[i], load_images([row], "base")[0], row)
                self.psnr += psnr
                self.ssim += ssim
                self.count += 1

    def of(self, image: np.ndarray, base: np.ndarray, row: ManifestRow) -> tuple[float, float]:
        """PSNR in dB, at most 60, and SSIM in [-1, 1] of one image (H, W, 3) uint8 against another."""
        a, b = (torch.tensor(x, device=self.device).permute(2, 0, 1)[None] / 255 for x in (image, base))
        outside = _outside(row, image.shape[:2]).to(self.device)
        error = (a - b).square().mean(1)[0][outside].mean()
        psnr = -10 * torch.log10(error.clamp(min=1e-6))
        _, ssim = structural_similarity_index_measure(a, b, data_range=1.0, return_full_image=True)
        return psnr.item(), ssim.mean(1)[0][outside].mean().item()

    def compute(self) -> dict[str, float]:
        if not self.count:
            return {}
        return {f"fidelity/{name}": (getattr(self, name) / self.count).item() for name in ("psnr", "ssim")}


def _outside(row: ManifestRow, size: tuple[int, int]) -> Tensor:
    """Mask (H, W) of the pixels outside all regions of the erased concept."""
    outside = torch.ones(size, dtype=torch.bool)
    for region in row.regions:
        if region.role != RETAIN:
            left, top, right, bottom = region.box
            outside[top:bottom, left:right] = False
    return outside

"""LPIPS (Zhang et al., CVPR 2018) between the erased model's image and the unedited model's image of the same row.

    d(x, y) = sum_l  mean_hw  sum_c  w_lc (x_lchw / |x_lhw| - y_lchw / |y_lhw|)^2

The sum is over the layers l of a network, whose activations at a position hw are vectors over c. UCE and RECE report
LPIPS for artists: it should be low for retained artists and high for erased ones.

IGMU (arXiv:2506.02761) compares with the unedited model's image of the prompt without the concept's words instead.
"""

# B batch, C channels of a layer, h w its positions.
from collections.abc import Sequence
from typing import ClassVar, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from unlearning.concepts import ERASE, RETAIN
from unlearning.evaluators.base import Evaluator, OracleMethod
from unlearning.store.manifest import ManifestRow, load_images

EPS = 1e-8  # added to squared lengths, as in the authors' implementation


class Layers(Protocol):
    """Maps images (B, H, W, 3) uint8 to the activations (B, C, h, w) of each layer; `weights` are the w_l (C,)."""

    name: str
    weights: Sequence[Tensor]

    def __call__(self, images: Tensor) -> list[Tensor]: ...


def distance(a: Sequence[Tensor], b: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """d (B,) between the activations of two batches of images, a list over layers each."""
    total = torch.zeros((), device=a[0].device)
    for x, y, w in zip(a, b, weights, strict=True):
        x, y = (z / (z.square().sum(1, keepdim=True) + EPS).sqrt() for z in (x, y))
        total = total + ((x - y).square() * w.to(x.device).view(1, -1, 1, 1)).sum(1).mean((1, 2))
    return total


class LPIPS(Evaluator):
    """The mean LPIPS over the images of a role. Rows of the unedited model itself are skipped.

    Args:
        layers: The network and its weights.
    """

    keys: ClassVar[dict[str, str]] = {RETAIN: "fidelity/lpips", ERASE: "efficacy/lpips_e"}
    other: ClassVar[Literal["base", "oracle"]] = "base"
    reference: ClassVar[str] = "the unedited model's image"
    needs: ClassVar[str] = "an erasure that changes images"
    higher_is_better: ClassVar[dict[str, bool]] = {"fidelity/lpips": False, "efficacy/lpips_e": True}

    def __init__(self, layers: Layers, device: str = "auto"):
        super().__init__(device)
        self.layers = layers
        self.zeros("sums", len(self.keys), 2)

    @property
    def protocol(self) -> str:
        return f"LPIPS of {self.layers.name} to {self.reference}, mean over the images of a role"

    def update(self, images: np.ndarray, rows: Sequence[ManifestRow]) -> None:
        for i, role in enumerate(self.keys):
            chosen = [j for j, row in enumerate(rows) if row.role == role and getattr(row, self.other)]
            if chosen:
                pair = (images[chosen], load_images([rows[j] for j in chosen], self.other))
                a, b = (self.layers(torch.tensor(x, device=self.device)) for x in pair)
                distances = distance(a, b, self.layers.weights)
                self.sums[i] += self.sums.new_tensor([distances.sum(), len(chosen)])

    def compute(self) -> dict[str, float]:
        return {key: total / n for key, (total, n) in zip(self.keys.values(), self.sums.tolist(), strict=True) if n}


class LPIPSWordRemoved(LPIPS):
    """The mean LPIPS to the unedited model's image of the same seed and the prompt without the concept's words.

    Args:
        layers: The network and its weights.
        oracle: Makes of the model one that leaves the words out.
    """

    keys: ClassVar[dict[str, str]] = {ERASE: "efficacy/lpips_word_removed", RETAIN: "retention/lpips_word_removed"}
    other = "oracle"
    reference = "the unedited model's image of the prompt without the concept's words"
    needs = "images of the prompts without the concept's words"
    higher_is_better: ClassVar[dict[str, bool]] = dict.fromkeys(keys.values(), False)

    def __init__(self, layers: Layers, oracle: OracleMethod, device: str = "auto"):
        super().__init__(layers, device)
        self.oracle = oracle

"""LPIPS (Zhang et al., CVPR 2018): how differently the erased model and the unedited one draw the same prompt and seed.

    d(x, y) = sum_l  mean_hw  sum_c  w_lc (x_lchw / |x_lhw| - y_lchw / |y_lhw|)^2

over the layers l of a network, whose activations at a place hw are vectors over c. UCE and RECE report it of artists:
it should be small for those that are kept, and large for those that are erased.
"""

# B batch, C channels of a layer, h w its places.
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models import AlexNet_Weights, alexnet
from torchvision.transforms.functional import normalize

from unlearning.concepts import ERASE, RETAIN
from unlearning.errors import UserError
from unlearning.evaluators.base import Evaluator, fingerprint
from unlearning.store.images import Row, load

KEYS = {RETAIN: "fidelity/lpips", ERASE: "efficacy/lpips_e"}
EPS = 1e-8  # of a length, as in the authors' implementation


class Layers(Protocol):
    """Pictures (B, H, W, 3) uint8 to activations (B, C, h, w) of each layer, on their device, and weights w_l (C,)."""

    name: str
    weights: Sequence[Tensor]

    def __call__(self, images: Tensor) -> list[Tensor]: ...


class AlexNet:
    """The authors' own choice: torchvision's AlexNet after each ReLU, by the weights that torchmetrics ships.

    Args:
        path: torchvision's file of AlexNet; by default where torch.hub keeps it.

    Raises:
        UserError: If it is not there or holds another network. Nothing is downloaded.
    """

    def __init__(self, path: str | Path | None = None):
        known = AlexNet_Weights.IMAGENET1K_V1
        path = Path(path or Path(torch.hub.get_dir()) / "checkpoints" / Path(known.url).name).expanduser()
        if not path.is_file():
            raise UserError(f"No AlexNet at {path}. Download {known.url} (233 MB), and name it by `judge.layers.path`.")
        with torch.device("meta"):
            self.network = alexnet().features.eval()
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            parts = {name.removeprefix("features."): value for name, value in state.items() if "features." in name}
            self.network.load_state_dict(parts, assign=True)
        except Exception as error:  # a damaged or foreign file can fail in any way
            raise UserError(f"{path} holds no weights of torchvision's AlexNet ({known.url}): {error}") from error
        self.mean, self.std = known.transforms().mean, known.transforms().std
        with resources.as_file(resources.files("torchmetrics") / "functional/image/lpips_models/alex.pth") as file:
            linear = torch.load(file, map_location="cpu", weights_only=True)
        self.weights = [weight.flatten() for _, weight in sorted(linear.items())]
        self.name = f"AlexNet {fingerprint(path)}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Tensor]:
        x, activations = normalize(images.permute(0, 3, 1, 2) / 255, self.mean, self.std), []
        for layer in self.network.to(images.device):
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                activations.append(x)
        return activations


def distance(a: Sequence[Tensor], b: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """d (B,) of the layers' activations of two batches of pictures."""
    total = 0
    for x, y, w in zip(a, b, weights, strict=True):
        x, y = (z / (z.square().sum(1, keepdim=True) + EPS).sqrt() for z in (x, y))
        total = total + ((x - y).square() * w.to(x.device).view(1, -1, 1, 1)).sum(1).mean((1, 2))
    return total


class LPIPS(Evaluator):
    """Means over the pictures of a role, each against the unedited model's of the same row.

    Rows without such a picture are passed over: the unedited model's own.

    Args:
        layers: The network and its weights.
    """

    needs: ClassVar[str] = "an erasure that changes pictures"
    higher_is_better: ClassVar[dict[str, bool]] = {"fidelity/lpips": False, "efficacy/lpips_e": True}

    def __init__(self, layers: Layers, device: str = "auto"):
        super().__init__(device)
        self.layers = layers
        self.zeros("sums", len(KEYS), 2)

    @property
    def protocol(self) -> str:
        return f"LPIPS of {self.layers.name} to the unedited model's picture, mean over the pictures of a role"

    def update(self, images: np.ndarray, rows: Sequence[Row]) -> None:
        for i, role in enumerate(KEYS):
            asked = [j for j, row in enumerate(rows) if row.role == role and row.base]
            if asked:
                pairs = (images[asked], load([rows[j] for j in asked], "base"))
                a, b = (self.layers(torch.tensor(pictures, device=self.device)) for pictures in pairs)
                distances = distance(a, b, self.layers.weights)
                self.sums[i] += self.sums.new_tensor([distances.sum(), len(asked)])

    def compute(self) -> dict[str, float]:
        return {key: total / n for key, (total, n) in zip(KEYS.values(), self.sums.tolist(), strict=True) if n}

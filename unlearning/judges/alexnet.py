"""torchvision's AlexNet as the network of LPIPS: the choice of its authors (Zhang et al., CVPR 2018)."""

# B batch, C channels of a layer, h w its positions.
from importlib import resources
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import AlexNet_Weights, alexnet
from torchvision.transforms.functional import normalize

from unlearning.errors import UserError
from unlearning.store.files import file_digest


class AlexNet:
    """The activations after each ReLU, and the layers' weights that torchmetrics ships.

    Args:
        path: torchvision's file of AlexNet; by default where torch.hub stores it.

    Raises:
        UserError: If the file is missing or holds another network. Nothing is downloaded.
    """

    def __init__(self, path: str | Path | None = None):
        entry = AlexNet_Weights.IMAGENET1K_V1
        path = Path(path or Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name).expanduser()
        if not path.is_file():
            raise UserError(f"No AlexNet at {path}. Download {entry.url} (233 MB) and set `judge.layers.path` to it.")
        with torch.device("meta"):
            self.network = alexnet().features.eval()
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            features = {name.removeprefix("features."): value for name, value in state.items() if "features." in name}
            self.network.load_state_dict(features, assign=True)
        except Exception as error:  # a damaged or foreign file can fail in any way
            raise UserError(f"{path} holds no weights of torchvision's AlexNet ({entry.url}): {error}") from error
        self.mean, self.std = entry.transforms().mean, entry.transforms().std
        with resources.as_file(resources.files("torchmetrics") / "functional/image/lpips_models/alex.pth") as file:
            linear = torch.load(file, map_location="cpu", weights_only=True)
        self.weights = [weight.flatten() for _, weight in sorted(linear.items())]
        self.name = f"AlexNet {file_digest(path)[:12]}"

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Tensor]:
        """Activations (B, C, h, w) of each layer for images (B, H, W, 3) uint8, on the images' device."""
        x, activations = normalize(images.permute(0, 3, 1, 2) / 255, self.mean, self.std), []
        for layer in self.network.to(images.device):
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                activations.append(x)
        return activations

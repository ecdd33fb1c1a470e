"""torchvision's ResNet-50, trained on ImageNet. ESD classifies Imagenette with it (Gandikota et al., 2023)."""

# B batch.
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.models import ResNet50_Weights, resnet50

from unlearning.errors import UserError, unknown
from unlearning.store.files import file_digest


class ResNet50:
    """Answers "object" with one of the 1000 classes of ImageNet, by torchvision's names.

    Args:
        path: torchvision's file of weights; by default where torch.hub stores it.
        weights: torchvision's name of the weights, which defines the preprocessing. ESD uses IMAGENET1K_V2.

    Raises:
        UserError: For an unknown name, or if the file is missing or holds other weights. Nothing is downloaded.
    """

    def __init__(self, path: str | Path | None = None, weights: str = "IMAGENET1K_V2"):
        if weights not in ResNet50_Weights.__members__:
            raise unknown("weights of torchvision's ResNet-50", weights, ResNet50_Weights.__members__)
        entry = ResNet50_Weights[weights]
        path = Path(path or Path(torch.hub.get_dir()) / "checkpoints" / Path(entry.url).name).expanduser()
        if not path.is_file():
            raise UserError(
                f"No ResNet-50 at {path}. Download {entry.url} (98 MB) and set `judge.classifier.path` to the file."
            )
        with torch.device("meta"):
            self.network = resnet50()
        try:
            self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), assign=True)
        except Exception as error:  # a damaged or foreign file can fail in any way
            raise UserError(f"{path} holds no weights of torchvision's ResNet-50 ({entry.url}): {error}") from error
        self.network.eval()
        self.preprocess, self.categories = entry.transforms(), tuple(entry.meta["categories"])
        self.name = f"ResNet-50 {file_digest(path)[:12]} as {weights}"

    @torch.no_grad()
    def __call__(self, images: Tensor, question: str) -> tuple[tuple[str, ...], Tensor]:
        """The class names, and their probabilities (B, 1000), for images (B, H, W, 3) uint8, on the images' device.

        Raises:
            UserError: For any question but "object".
        """
        if question != "object":
            raise unknown(f"question for {self.name}:", question, ["object"])
        images = torch.as_tensor(images)
        pixels = torch.stack([self.preprocess(Image.fromarray(np.asarray(image))) for image in images.cpu()])
        return self.categories, self.network.to(images.device)(pixels.to(images.device)).softmax(1)

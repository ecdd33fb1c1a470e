"""torchvision's ResNet-50 as a classifier: ESD's of Imagenette (Gandikota et al., 2023), or of all of ImageNet."""

# B batch.
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.models import ResNet50_Weights, resnet50

from unlearning.errors import UserError
from unlearning.evaluators.base import fingerprint, unknown


class ResNet50:
    """Answers "object" by one of ImageNet's 1000 classes, as torchvision names them.

    Args:
        path: torchvision's file of weights; by default where torch.hub keeps it.
        weights: torchvision's name of them, which tells how pictures are resized: ESD takes IMAGENET1K_V2.

    Raises:
        UserError: For an unknown name, or if the file is not there or holds other weights. Nothing is downloaded.
    """

    def __init__(self, path: str | Path | None = None, weights: str = "IMAGENET1K_V2"):
        if weights not in ResNet50_Weights.__members__:
            raise unknown("weights of torchvision's ResNet-50", weights, ResNet50_Weights.__members__)
        known = ResNet50_Weights[weights]
        path = Path(path or Path(torch.hub.get_dir()) / "checkpoints" / Path(known.url).name).expanduser()
        if not path.is_file():
            raise UserError(
                f"No ResNet-50 at {path}. Download {known.url} (98 MB), and name it by `judge.classifier.path`."
            )
        with torch.device("meta"):
            self.network = resnet50()
        try:
            self.network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), assign=True)
        except Exception as error:  # a damaged or foreign file can fail in any way
            raise UserError(f"{path} holds no weights of torchvision's ResNet-50 ({known.url}): {error}") from error
        self.network.eval()
        self.preprocess, self.categories = known.transforms(), tuple(known.meta["categories"])
        self.name = f"ResNet-50 {fingerprint(path)} as {weights}"

    @torch.no_grad()
    def __call__(self, images: Tensor, question: str) -> tuple[tuple[str, ...], Tensor]:
        """The thousand answers, and their probabilities (B, 1000), for pictures (B, H, W, 3) uint8, on their device.

        Raises UserError for any question but "object".
        """
        if question != "object":
            raise unknown(f"question for {self.name}:", question, ["object"])
        images = torch.as_tensor(images)
        pictures = [self.preprocess(Image.fromarray(np.asarray(image))) for image in images.cpu()]
        return self.categories, self.network.to(images.device)(torch.stack(pictures).to(images.device)).softmax(1)

"""The judge of the embedded models: it classifies the object and the style of an image.

One object class is "nothing", for images without a recognisable object. The judge is trained on rendered drawings
(experiments/openmoji/train_judge.py) whose seeds no generator and no method uses. Its features before the last layer
replace Inception's in the FID of the embedded models.
"""

# B batch, H W any size, F features, O objects + 1, S styles.
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from unlearning.errors import UserError, unknown
from unlearning.models.folders import load_complete
from unlearning.store.files import file_digest

NOTHING = "nothing"  # the class of images without a recognisable object


class Verdict(NamedTuple):
    """The outputs of the judge."""

    objects: Tensor  # (B, O) logits; the last class is NOTHING
    styles: Tensor  # (B, S) logits
    features: Tensor  # (B, F)


class _Block(nn.Module):
    """A residual block; a stride of 2 halves the resolution."""

    def __init__(self, channels_in: int, channels: int, stride: int):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.skip = nn.Sequential(nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.skip(x))


class Judge(ModelMixin, ConfigMixin):
    """A convolutional classifier of images (B, 3, H, W) in [0, 1].

    Args:
        objects, styles: The class names; "nothing" is added to the objects.
        channels: Channels of each block.
        size: Images are resized to this side in pixels.
    """

    @register_to_config
    def __init__(
        self, objects: list[str], styles: list[str], channels: tuple[int, ...] = (32, 48, 96, 160), size: int = 64
    ):
        super().__init__()
        self.objects, self.styles = (*objects, NOTHING), tuple(styles)
        self.stem = nn.Conv2d(3, channels[0], 3, 1, 1)
        pairs = zip((channels[0], *channels[:-1]), channels, strict=True)
        self.trunk = nn.Sequential(*(_Block(a, b, 2) for a, b in pairs))
        self.object_head = nn.Linear(channels[-1], len(self.objects))
        self.style_head = nn.Linear(channels[-1], len(self.styles))

    def activations(self, x: Tensor) -> list[Tensor]:
        """The output (B, C, h, w) of each block."""
        if x.shape[-1] != self.config.size:
            x = F.interpolate(x, size=(self.config.size,) * 2, mode="bilinear", antialias=True, align_corners=False)
        x, outputs = self.stem(2 * x - 1), []
        for block in self.trunk:
            outputs.append(x := block(x))
        return outputs

    def forward(self, x: Tensor) -> Verdict:
        features = self.activations(x)[-1].mean((2, 3))
        return Verdict(self.object_head(features), self.style_head(features), features)

    @torch.no_grad()
    def names(self, x: Tensor) -> list[str]:
        """The most probable object of each image."""
        return [self.objects[i] for i in self(x).objects.argmax(1).tolist()]


class _PretrainedJudge:
    """A trained judge, which runs on the device of the images.

    Args:
        path: The folder that `Judge.save_pretrained` wrote.

    Raises:
        UserError: If there is no judge at `path`, or it lacks weights.
    """

    def __init__(self, path: str | Path):
        weights = Path(path) / "diffusion_pytorch_model.safetensors"
        if not weights.is_file():
            raise UserError(
                f"No judge at {path}. The project has one in unlearning/weights/judge/classifier (`paths.weights` is "
                "the folder above `judge/`); `python experiments/openmoji/train_judge.py` makes it."
            )
        self.judge = load_complete(Judge, path, torch_dtype=torch.float32).eval()
        self.name = f"emoji judge {file_digest(weights)[:12]}"

    @torch.no_grad()
    def verdict(self, images: Tensor) -> Verdict:
        """The outputs for images (B, H, W, 3) uint8."""
        images = torch.as_tensor(images)
        return self.judge.to(images.device)(images.permute(0, 3, 1, 2) / 255)


class EmojiJudge(_PretrainedJudge):
    """The judge as a classifier. It answers "object" and "style"."""

    def __call__(self, images: Tensor, question: str) -> tuple[tuple[str, ...], Tensor]:
        """The class names, and their probabilities (B, O or S), for images (B, H, W, 3) uint8.

        Raises:
            UserError: For any other question.
        """
        verdict = self.verdict(images)
        match question:
            case "object":
                return self.judge.objects, verdict.objects.softmax(1)
            case "style":
                return self.judge.styles, verdict.styles.softmax(1)
        raise unknown(f"question for the {self.name}:", question, ("object", "style"))


class JudgeFeatures(_PretrainedJudge):
    """The judge as a feature extractor for FID and KID: images (B, H, W, 3) uint8 to features (B, F)."""

    def __call__(self, images: Tensor) -> Tensor:
        return self.verdict(images).features


class JudgeLayers(_PretrainedJudge):
    """The judge as the network of LPIPS. Every channel has the weight 1 / (number of blocks)."""

    def __init__(self, path: str | Path):
        super().__init__(path)
        channels = self.judge.config.channels
        self.weights = [torch.full((count,), 1 / len(channels)) for count in channels]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Tensor]:
        """Activations (B, C, h, w) of each block for images (B, H, W, 3) uint8."""
        images = torch.as_tensor(images)
        return self.judge.to(images.device).activations(images.permute(0, 3, 1, 2) / 255)

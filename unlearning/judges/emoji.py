"""The embedded world's judge: names the object and the style of a picture, or says that nothing in it is recognisable.

Trained on rendered drawings alone (experiments/openmoji/train_judge.py), from seeds that no generator and no method
ever sees. Its penultimate features stand in for Inception's when an FID is taken in the embedded world.
"""

# B batch, H W any size, F features, O objects + 1, S styles.
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from unlearning.errors import UserError
from unlearning.evaluators.base import fingerprint, unknown

NOTHING = "nothing"  # the class of pictures in which nothing is recognisable


class Verdict(NamedTuple):
    objects: Tensor  # (B, O) logits; the last class is NOTHING
    styles: Tensor  # (B, S) logits
    features: Tensor  # (B, F)


class _Block(nn.Module):
    """A residual block that may halve the picture."""

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
    """Classifies pictures (B, 3, H, W) in [0, 1], resized to `size` first."""

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
        """What each of the trunk's blocks puts out, (B, C, h, w)."""
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
        """The object seen in each picture."""
        return [self.objects[i] for i in self(x).objects.argmax(1).tolist()]


class _Trained:
    """The trained judge, on whatever device the pictures are.

    Args:
        path: The folder that `Judge.save_pretrained` wrote.

    Raises:
        UserError: If there is no judge.
    """

    def __init__(self, path: str | Path):
        weights = Path(path) / "diffusion_pytorch_model.safetensors"
        if not weights.is_file():
            raise UserError(
                f"No judge at {path}. Its weights are part of the project (unlearning/weights/judge/classifier), made "
                "by `python experiments/openmoji/train_judge.py`; `paths.weights` names the folder above `judge/`."
            )
        self.judge = Judge.from_pretrained(path, torch_dtype=torch.float32).eval()
        self.name = f"emoji judge {fingerprint(weights)}"

    @torch.no_grad()
    def verdict(self, images: Tensor) -> Verdict:
        """Of pictures (B, H, W, 3) uint8."""
        images = torch.as_tensor(images)
        return self.judge.to(images.device)(images.permute(0, 3, 1, 2) / 255)


class EmojiJudge(_Trained):
    """The judge as a classifier: answers "object" and "style"."""

    def __call__(self, images: Tensor, question: str) -> tuple[tuple[str, ...], Tensor]:
        """The possible answers, and their probabilities (B, O or S). Raises UserError for any other question."""
        verdict = self.verdict(images)
        match question:
            case "object":
                return self.judge.objects, verdict.objects.softmax(1)
            case "style":
                return self.judge.styles, verdict.styles.softmax(1)
        raise unknown(f"question for the {self.name}:", question, ("object", "style"))


class JudgeFeatures(_Trained):
    """The judge as a feature extractor: pictures (B, H, W, 3) uint8 to (B, F)."""

    def __call__(self, images: Tensor) -> Tensor:
        return self.verdict(images).features


class JudgeLayers(_Trained):
    """The judge as what an LPIPS is taken on: all channels of its blocks weigh the same, and its blocks 1 together."""

    def __init__(self, path: str | Path):
        super().__init__(path)
        channels = self.judge.config.channels
        self.weights = [torch.full((count,), 1 / len(channels)) for count in channels]

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[Tensor]:
        """Activations (B, C, h, w) for pictures (B, H, W, 3) uint8."""
        images = torch.as_tensor(images)
        return self.judge.to(images.device).activations(images.permute(0, 3, 1, 2) / 255)

"""CLIP as a zero-shot classifier: it ranks names by how well they describe an image."""

# B batch, N names, D embedding width.
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from unlearning.config.values import Template
from unlearning.data.openmoji import CIFAR10
from unlearning.errors import unknown
from unlearning.judges.clip import load_clip
from unlearning.store.files import digest


class ZeroShotCLIP:
    """Zero-shot classification: softmax over names of logit scale × cosine.

    Radford et al. (ICML 2021), section 3.1, with the prompt of MACE (Lu et al., CVPR 2024).

    Args:
        model: A CLIP's name on the Hugging Face Hub, or its folder.
        names: The possible answers to each question; by default the classes of CIFAR-10 for "object".
        template: How a name becomes a text.

    Raises:
        UserError: If there is no CLIP at `model`.
    """

    def __init__(
        self,
        model: str | Path = "openai/clip-vit-base-patch32",
        names: Mapping[str, Sequence[str]] | None = None,
        template: Template = "a photo of the {}",
    ):
        self.names = {q: tuple(answers) for q, answers in (names or {"object": CIFAR10}).items()}
        self.template = template
        self.clip, self.processor, clip_name = load_clip(model, "judge.classifier.model")
        self.name = f"zero-shot CLIP {clip_name} ({template!r}, {self._counts()})"
        self._texts: dict[str, Tensor] = {}

    def _counts(self) -> str:
        """The number of names for each question, and a digest of them."""
        return ", ".join(f"{len(names)} {question}s {digest(names)[:8]}" for question, names in self.names.items())

    @torch.no_grad()
    def __call__(self, images: Tensor, question: str) -> tuple[tuple[str, ...], Tensor]:
        """The names, and their probabilities (B, N), for images (B, H, W, 3) uint8. Runs on the images' device.

        Raises:
            UserError: For a question without names.
        """
        if question not in self.names:
            raise unknown(f"question for {self.name}:", question, self.names)
        images = torch.as_tensor(images)
        clip = self.clip.to(images.device)
        pixels = self.processor(images=list(images.cpu().permute(0, 3, 1, 2)), return_tensors="pt").pixel_values
        features = F.normalize(clip.get_image_features(pixels.to(images.device)))  # (B, D)
        logits = clip.logit_scale.exp() * features @ self._text_features(question).to(images.device).T
        return self.names[question], logits.softmax(1)

    def _text_features(self, question: str) -> Tensor:
        """The unit embeddings (N, D) of a question's names; computed once."""
        if question not in self._texts:
            texts = [self.template.format(name) for name in self.names[question]]
            tokens = self.processor(text=texts, return_tensors="pt", padding=True).to(self.clip.device)
            self._texts[question] = F.normalize(self.clip.get_text_features(**tokens))
        return self._texts[question]

"""CLIP score: 100 × the cosine between an image and its prompt (Hessel et al., EMNLP 2021, whose weight is 2.5)."""

# B batch.
from collections.abc import Sequence
from functools import partial
from typing import ClassVar

import numpy as np
import torch
from torchmetrics.multimodal import CLIPScore as TorchmetricsCLIPScore

from unlearning.concepts import ERASE, RETAIN
from unlearning.evaluators.base import Evaluator
from unlearning.judges.clip import load_clip
from unlearning.store.manifest import ManifestRow

KEYS = {RETAIN: "fidelity/clip_score", ERASE: "efficacy/clip_score_e"}


class CLIPScore(Evaluator):
    """How well images match their prompts: high for retained concepts, low for erased ones.

    H_a = CLIP_s - CLIP_e is the difference of the two (Lu et al., CVPR 2024, for artists).

    Args:
        model: A CLIP's name on the Hugging Face Hub, or its folder.

    Raises:
        UserError: If there is no CLIP at `model`.
    """

    needs: ClassVar[str] = "images of the erased concept or of other concepts"
    higher_is_better: ClassVar[dict[str, bool]] = {
        "fidelity/clip_score": True,
        "efficacy/clip_score_e": False,
        "summary/h_a": True,
    }

    def __init__(self, model: str = "openai/clip-vit-base-patch16", device: str = "auto"):
        super().__init__(device)
        clip, processor, self.name = load_clip(model, "judge.clip")
        # Without truncation here, torchmetrics cuts off a long prompt's end token, from which CLIP reads the text.
        self.batch = TorchmetricsCLIPScore(lambda: (clip, partial(processor, truncation=True))).to(self.device)
        self.zeros("scores", len(KEYS))
        self.zeros("counts", len(KEYS))

    @property
    def protocol(self) -> str:
        return f"100 cos(image, prompt) by CLIP {self.name}, mean over the images of a role"

    def update(self, images: np.ndarray, rows: Sequence[ManifestRow]) -> None:
        pixels = torch.as_tensor(images, device=self.device).permute(0, 3, 1, 2)
        for i, role in enumerate(KEYS):
            chosen = [j for j, row in enumerate(rows) if row.role == role]
            if chosen:
                self.batch.reset()
                self.batch.update(pixels[chosen], [rows[j].prompt for j in chosen])
                self.scores[i] += self.batch.score
                self.counts[i] += self.batch.n_samples

    def compute(self) -> dict[str, float]:
        sums = zip(KEYS.values(), self.scores.tolist(), self.counts.tolist(), strict=True)
        numbers = {key: max(score / count, 0.0) for key, score, count in sums if count}  # NaN stays NaN in this order
        if len(numbers) == len(KEYS):
            numbers["summary/h_a"] = numbers[KEYS[RETAIN]] - numbers[KEYS[ERASE]]
        return numbers

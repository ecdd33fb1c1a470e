"""CLIP score: 100 × the cosine between a picture and its prompt (Hessel et al., EMNLP 2021; their weight is 2.5)."""

# B batch, D embedding width.
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor
from torchmetrics.multimodal import CLIPScore as TorchmetricsCLIPScore
from transformers import CLIPModel, CLIPProcessor

from unlearning.concepts import ERASE, RETAIN
from unlearning.errors import UserError
from unlearning.evaluators.base import Evaluator, fingerprint
from unlearning.store.images import Row

KEYS = {RETAIN: "fidelity/clip_score", ERASE: "efficacy/clip_score_e"}


class TensorCLIP(CLIPModel):
    """CLIP whose features are tensors (B, D), as torchmetrics expects; transformers 5 wraps them in an output."""

    def get_image_features(self, *args, **kwargs) -> Tensor:
        return super().get_image_features(*args, **kwargs).pooler_output

    def get_text_features(self, *args, **kwargs) -> Tensor:
        return super().get_text_features(*args, **kwargs).pooler_output


def load_clip(model: str | Path, setting: str) -> tuple[TensorCLIP, CLIPProcessor, str]:
    """A CLIP by its name on the Hugging Face Hub or by its folder, with what identifies it and its weights.

    Raises:
        UserError: If it is in neither place; tells to change `setting`.
    """
    try:
        clip = TensorCLIP.from_pretrained(model, dtype=torch.float32).eval()
        processor = CLIPProcessor.from_pretrained(model)
    except OSError as error:
        raise UserError(
            f"No CLIP at {model}. `{setting}` names one: a folder that CLIPModel.save_pretrained wrote, or a name on "
            "the Hugging Face Hub (openai/clip-vit-base-patch32, ...) that can be downloaded or is in the local cache. "
            "The embedded world's is part of the project (unlearning/weights/judge/clip, below `paths.weights`), made "
            "by `python experiments/openmoji/train_clip.py`."
        ) from error
    if (folder := Path(model)).is_dir():
        weights = min([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
        return clip, processor, f"{folder.name} {fingerprint(weights)}"
    return clip, processor, f"{model} {(clip.config._commit_hash or '')[:12]}".rstrip()


class CLIPScore(Evaluator):
    """How well pictures match their prompts: of retained concepts (to keep), of erased ones (to lose).

    H_a = CLIP_s - CLIP_e is the one less the other (Lu et al., CVPR 2024: of artists).

    Args:
        model: A CLIP's name on the Hugging Face Hub, or its folder.

    Raises:
        UserError: If there is no such CLIP.
    """

    needs: ClassVar[str] = "pictures of the erased concept or of others"
    higher_is_better: ClassVar[dict[str, bool]] = {
        "fidelity/clip_score": True,
        "efficacy/clip_score_e": False,
        "summary/h_a": True,
    }

    def __init__(self, model: str = "openai/clip-vit-base-patch16", device: str = "auto"):
        super().__init__(device)
        clip, processor, self.name = load_clip(model, "judge.clip")
        # torchmetrics would cut a long prompt's end token off, from which CLIP reads the whole text.
        self.batch = TorchmetricsCLIPScore(lambda: (clip, partial(processor, truncation=True))).to(self.device)
        self.zeros("scores", len(KEYS))
        self.zeros("counts", len(KEYS))

    @property
    def protocol(self) -> str:
        return f"100 cos(picture, prompt) by CLIP {self.name}, mean over the pictures of a role"

    def update(self, images: np.ndarray, rows: Sequence[Row]) -> None:
        pictures = torch.as_tensor(images, device=self.device).permute(0, 3, 1, 2)
        for i, role in enumerate(KEYS):
            asked = [j for j, row in enumerate(rows) if row.role == role]
            if asked:
                self.batch.reset()
                self.batch.update(pictures[asked], [rows[j].prompt for j in asked])
                self.scores[i] += self.batch.score
                self.counts[i] += self.batch.n_samples

    def compute(self) -> dict[str, float]:
        sums = zip(KEYS.values(), self.scores.tolist(), self.counts.tolist(), strict=True)
        numbers = {key: max(score / count, 0.0) for key, score, count in sums if count}  # NaN stays NaN in this order
        if len(numbers) == len(KEYS):
            numbers["summary/h_a"] = numbers[KEYS[RETAIN]] - numbers[KEYS[ERASE]]
        return numbers

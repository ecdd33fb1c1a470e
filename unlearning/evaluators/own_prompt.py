"""The score in UnGuide's repository: how well CLIP tells an image's own prompt from the task's other prompts.

It differs from MACE's protocol (evaluators/accuracy.py), whose numbers the table of UnGuide's paper cites: the synonyms
are among the candidate texts, and an image of a synonym is scored for the synonym instead of the concept.
"""

# B batch, P prompts, D embedding width.
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F

from unlearning.concepts import ERASE, RETAIN, SYNONYM, UnlearningTask
from unlearning.evaluators.accuracy import h_o
from unlearning.evaluators.base import Evaluator
from unlearning.judges.clip import load_clip
from unlearning.store.manifest import ManifestRow

KEYS = {ERASE: "efficacy/acc_e_own", SYNONYM: "efficacy/acc_g_own", RETAIN: "retention/acc_s_own"}


class OwnPrompt(Evaluator):
    """Acc_e, Acc_g, Acc_s and H_o in percent: the mean softmax probability of an image's own prompt.

    Rows whose prompt is not one of the task's are skipped.

    Args:
        model: A CLIP's name on the Hugging Face Hub, or its folder.

    Raises:
        UserError: If there is no CLIP at `model`.
    """

    higher_is_better: ClassVar[dict[str, bool]] = {key: role == RETAIN for role, key in KEYS.items()} | {
        "summary/h_o_own": True
    }

    def __init__(self, model: str | Path, device: str = "auto"):
        super().__init__(device)
        self.clip, self.processor, self.name = load_clip(model, "judge.clip")
        self.prompts: list[str] = []
        self.zeros("sums", len(KEYS), 2)

    @property
    def protocol(self) -> str:
        return f"softmax of CLIP {self.name} over the task's {len(self.prompts)} prompts, a picture's own"

    @torch.no_grad()
    def prepare(self, task: UnlearningTask) -> None:
        self.prompts = list(dict.fromkeys(prompt.text for prompt in task.prompts))
        tokens = self.processor(text=self.prompts, return_tensors="pt", padding=True, truncation=True)
        self.clip.to(self.device)
        self._texts = F.normalize(self.clip.get_text_features(**tokens.to(self.device)))  # (P, D)

    @torch.no_grad()
    def update(self, images: np.ndarray, rows: Sequence[ManifestRow]) -> None:
        pixels = self.processor(images=list(images.transpose(0, 3, 1, 2)), return_tensors="pt").pixel_values
        features = F.normalize(self.clip.get_image_features(pixels.to(self.device)))  # (B, D)
        probabilities = (self.clip.logit_scale.exp() * features @ self._texts.T).softmax(1)
        for row, probability in zip(rows, probabilities, strict=True):
            if row.role in KEYS and row.prompt in self.prompts:
                one = self.sums.new_tensor([probability[self.prompts.index(row.prompt)], 1])
                self.sums[[*KEYS].index(row.role)] += one

    def compute(self) -> dict[str, float]:
        counted = zip(KEYS.values(), self.sums.tolist(), strict=True)
        numbers = {key: 100 * total / count for key, (total, count) in counted if count}
        if len(numbers) == len(KEYS):
            numbers["summary/h_o_own"] = h_o(*(numbers[KEYS[role]] for role in (ERASE, RETAIN, SYNONYM)))
        return numbers

"""Accuracies of a classifier over the pictures: MACE's Acc_e, Acc_s, Acc_g, H_o and UnlearnCanvas' UA, IRA, CRA.

MACE: Lu et al., CVPR 2024, section 4.2. UnlearnCanvas: Zhang et al., NeurIPS 2024, section 4.
"""

# B batch, N names. Everything that leaves `compute` is in percent.
from collections.abc import Sequence
from statistics import harmonic_mean
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from unlearning.concepts import ERASE, RETAIN, ROLES, SYNONYM
from unlearning.errors import UserError, unknown
from unlearning.evaluators.base import Evaluator
from unlearning.evaluators.regions import with_regions
from unlearning.judges.emoji import NOTHING
from unlearning.store.images import Row

SCORES = ("argmax", "softmax")


class Classifier(Protocol):
    """Answers questions about pictures: "object", "style". `name` identifies it and its weights."""

    name: str

    def __call__(self, images: Tensor, question: str) -> tuple[tuple[str, ...], Tensor]:
        """The possible answers, and their probabilities (B, N), for pictures (B, H, W, 3) uint8, on their device."""
        ...


def h_o(acc_e: float, acc_s: float, acc_g: float) -> float:
    """H_o = 3 / ((1 - Acc_e)^-1 + Acc_s^-1 + (1 - Acc_g)^-1) (MACE, eq. 8), in percent; 0 where a part is 0."""
    return harmonic_mean([max(0.0, part) for part in (100 - acc_e, acc_s, 100 - acc_g)])


def h_c(acc_e: float, acc_s: float) -> float:
    """H_c = 2 / ((1 - Acc_e)^-1 + Acc_s^-1) (MACE: of celebrities, who have no synonyms), in percent."""
    return harmonic_mean([max(0.0, part) for part in (100 - acc_e, acc_s)])


class Accuracy(Evaluator):
    """How often the pictures show what their labels say, averaged over the pictures of a role.

    The first of a row's labels is the question that the erasure is about; any other is the cross-domain question. A
    synonym's label is the name of the concept it stands for, as in MACE. Rows without labels are passed over; one with
    regions is as many pictures.

    Args:
        classifier: Answers the questions.
        score: What a picture scores: "softmax", the probability of the right answer (MACE), or "argmax", whether the
            most probable answer is right (UnlearnCanvas).

    Raises:
        UserError: For an unknown score, for a label that the classifier has no name for, or for a picture on which the
            classifier fails: one that it gives no probabilities for would otherwise pass as one that is erased.
    """

    needs: ClassVar[str] = "a dataset that says what its pictures should show; clip_score and own_prompt need none"
    higher_is_better: ClassVar[dict[str, bool]] = {
        "efficacy/acc_e": False,
        "efficacy/acc_g": False,
        "efficacy/ua": True,
        "efficacy/unrecognisable": False,
        "retention/acc_s": True,
        "retention/ira": True,
        "retention/cra": True,
        "summary/h_o": True,
        "summary/h_c": True,
    }

    def __init__(self, classifier: Classifier, score: str = "softmax", device: str = "auto"):
        super().__init__(device)
        if score not in SCORES:
            raise unknown("score", score, SCORES)
        self.classifier, self.score = classifier, score
        # Sum of scores and number of pictures.
        self.zeros("first", len(ROLES), 2)
        self.zeros("cross", 2)
        self.zeros("nothing", 2)

    @property
    def protocol(self) -> str:
        return f"{self.score} of {self.classifier.name}, mean over the pictures of a role"

    def update(self, images: np.ndarray, rows: Sequence[Row]) -> None:
        images, rows = with_regions(images, rows)
        pictures = torch.as_tensor(images, device=self.device)
        for question in dict.fromkeys(q for row in rows for q in row.labels):
            asked = [i for i, row in enumerate(rows) if question in row.labels]
            names, probabilities = self.classifier(pictures[asked], question)
            if not probabilities.isfinite().all():
                failed = asked[int((~probabilities.isfinite()).any(1).nonzero()[0])]
                raise UserError(f"{self.classifier.name} gives {rows[failed].path} probabilities that are no numbers.")
            right = [self._index(names, rows[i].labels[question], question) for i in asked]
            best = probabilities.argmax(1).tolist()
            if self.score == "argmax":
                scores = [float(a == b) for a, b in zip(best, right, strict=True)]
            else:
                scores = probabilities[torch.arange(len(asked)), right].tolist()
            for i, score, top in zip(asked, scores, best, strict=True):
                self._add(rows[i], question, score, names[top] if NOTHING in names else None)

    def _index(self, names: tuple[str, ...], label: str, question: str) -> int:
        if label not in names:
            raise unknown(f"{question} for {self.classifier.name}:", label, names)
        return names.index(label)

    def _add(self, row: Row, question: str, score: float, seen: str | None) -> None:
        one = self.cross.new_tensor([score, 1])
        if question != next(iter(row.labels)):
            self.cross += one
            return
        self.first[ROLES.index(row.role)] += one
        if row.role == ERASE and seen is not None:
            self.nothing += self.nothing.new_tensor([seen == NOTHING, 1])

    def compute(self) -> dict[str, float]:
        def percent(sums: Tensor) -> float | None:
            total, count = sums.tolist()
            return 100 * total / count if count else None

        acc_e, acc_g, acc_s = (percent(self.first[ROLES.index(role)]) for role in (ERASE, SYNONYM, RETAIN))
        cra = percent(self.cross)
        numbers = {
            "efficacy/acc_e": acc_e,
            "efficacy/acc_g": acc_g,
            "retention/acc_s": acc_s,
            "efficacy/unrecognisable": percent(self.nothing),
            "retention/cra": cra,
        }
        if cra is not None:
            numbers |= {"efficacy/ua": None if acc_e is None else 100 - acc_e, "retention/ira": acc_s}
        if None not in (acc_e, acc_s):
            numbers |= (
                {"summary/h_c": h_c(acc_e, acc_s)} if acc_g is None else {"summary/h_o": h_o(acc_e, acc_s, acc_g)}
            )
        return {key: value for key, value in numbers.items() if value is not None}

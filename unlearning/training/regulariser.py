"""Regularisers: a penalty on the loss, constraints on each weight, or a fit of their own; and masks of weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from math import isfinite
from typing import Protocol

import torch
from torch import Tensor, nn

from unlearning.concepts import UnlearningTask
from unlearning.erasures.base import Erasure
from unlearning.errors import UserError
from unlearning.models.diffusion import DiffusionModel
from unlearning.training.student import Pair

Fit = Callable[[DiffusionModel, UnlearningTask], Erasure]
Constraint = Callable[[Tensor, Tensor], Tensor]  # (theta, theta_0) of one weight -> the nearest theta that is allowed


class Training(Protocol):
    """What a regulariser uses of a trained method, after student and data are set up.

    Attributes:
        task: The method's task.
        teacher: The frozen model before training.
        pair: Student, teacher and trainable parameters.
    """

    task: UnlearningTask
    teacher: DiffusionModel
    pair: Pair

    def losses(self, count: int) -> Iterator[Tensor]:
        """The method's objective () on its first `count` batches."""
        ...


class Regulariser:
    """The base class of regularisers, which does nothing. Subclasses override what they need."""

    def penalty(self, theta: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor | float:
        """The term that is added to the loss, ()."""
        return 0.0

    def constraints(self, training: Training) -> Mapping[str, Constraint]:
        """The constraints by weight name; `hold` enforces them after every step.

        Raises:
            UserError: If the method's student trains no weights that the regulariser applies to.
        """
        return {}

    def fit(self, fit: Fit, model: DiffusionModel, task: UnlearningTask) -> Erasure:
        """The erasure, from one training run or several."""
        return fit(model, task)


@torch.no_grad()
def hold(pair: Pair, constraints: Mapping[str, Constraint]) -> None:
    """Replaces the student's weights by the nearest ones that satisfy the constraints."""
    for name, constraint in constraints.items():
        pair.parameters[name].copy_(constraint(pair.parameters[name], pair.start[name]))


def masked(masks: Mapping[str, Tensor]) -> dict[str, Constraint]:
    """Constraints under which entries outside the masks keep their exact values."""
    return {name: partial(_within, mask) for name, mask in masks.items()}


def _within(mask: Tensor, theta: Tensor, start: Tensor) -> Tensor:
    return torch.where(mask, theta, start)


def summed_gradients(losses: Iterable[Tensor], weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The sum of the losses' gradients, by name; zero for a weight that no loss depends on."""
    total = {name: torch.zeros_like(p) for name, p in weights.items()}
    for loss in losses:
        gradients = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for own, gradient in zip(total.values(), gradients, strict=True):
            if gradient is not None:
                own += gradient
    return total


def largest(scores: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Masks by name that select the `share` of all entries with the largest scores; at least one entry."""
    flat = torch.cat([score.flatten().float() for score in scores.values()]).cpu().numpy()
    missing = max(1, int(share * len(flat)))
    flat.partition(-missing)  # in place: topk would add an int64 index for each entry
    least = flat[-missing].item()
    if not isfinite(flat.max()):  # NaN if one of them is
        raise UserError(
            "The gradients that choose the weights to train are not finite. float16 overflows; bfloat16 does not."
        )
    masks = {name: score.float() > least for name, score in scores.items()}
    missing -= sum(int(mask.sum()) for mask in masks.values())
    for name, score in scores.items():  # ties with the smallest selected score: the first ones
        ties = (score.float() == least).flatten().nonzero()[:missing]
        masks[name].view(-1)[ties] = True
        missing -= len(ties)
    return masks

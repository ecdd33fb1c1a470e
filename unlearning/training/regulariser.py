"""Regularisers: a penalty on the loss, constraints on each weight, or a fit of their own; and masks of weights."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from unlearning.concepts import UnlearningTask
from unlearning.erasures.base import Erasure
from unlearning.models.diffusion import DiffusionModel
from unlearning.training.student import Pair

Fit = Callable[[DiffusionModel, UnlearningTask], Erasure]
Constraint = Callable[[Tensor, Tensor], Tensor]  # (theta, theta_0) of one weight -> the nearest theta that is allowed


class Training(Protocol):
    """What a regulariser sees of a trained method, once the student and the data are there.

    Attributes:
        task: The method's.
        teacher: The model as it was before.
        pair: Student, teacher, and what moves.
    """

    task: UnlearningTask
    teacher: DiffusionModel
    pair: Pair

    def losses(self, count: int) -> Iterator[Tensor]:
        """The method's objective () on its first `count` batches."""
        ...


class Regulariser:
    """Does nothing. Subclasses override what they need."""

    def penalty(self, theta: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor | float:
        """What is added to the loss, ()."""
        return 0.0

    def constraints(self, training: Training) -> Mapping[str, Constraint]:
        """What each weight has to satisfy after every step, by name.

        Raises:
            UserError: If the method's student has no weights that the regulariser is for.
        """
        return {}

    def fit(self, fit: Fit, model: DiffusionModel, task: UnlearningTask) -> Erasure:
        """The erasure, by one or several trainings."""
        return fit(model, task)


@torch.no_grad()
def hold(pair: Pair, constraints: Mapping[str, Constraint]) -> None:
    """Replaces the student's weights by the nearest ones that satisfy the constraints."""
    for name, constraint in constraints.items():
        pair.parameters[name].copy_(constraint(pair.parameters[name], pair.start[name]))


def masked(masks: Mapping[str, Tensor]) -> dict[str, Constraint]:
    """The constraints that entries outside of the masks keep their values, to the bit."""
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
    """Masks, by name, of the `share` of all entries that has the largest scores; at least one entry."""
    flat = torch.cat([score.flatten().float() for score in scores.values()]).cpu().numpy()
    missing = max(1, int(share * len(flat)))
    flat.partition(-missing)  # in place: topk would add an int64 index for each entry
    least = flat[-missing].item()
    masks = {name: score.float() > least for name, score in scores.items()}
    missing -= sum(int(mask.sum()) for mask in masks.values())
    for name, score in scores.items():  # of those that are equal to the least, the first ones
        ties = (score.float() == least).flatten().nonzero()[:missing]
        masks[name].view(-1)[ties] = True
        missing -= len(ties)
    return masks

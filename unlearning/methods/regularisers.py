"""Regularisers of continual unlearning (CUIG, ICLR 2026), around any trained method.

They limit how far a training moves the weights theta from their values theta_0 before it, so that erasing one concept
after the other costs less of what is retained. The objective stays the method's own. As in the authors' code:

    l1sp, l2sp            loss + weight * mean |theta - theta_0|^p over all trained entries, p = 1 or 2
    gradient_projection   (theta - theta_0) C = 0 for the maps that read text; C: text states of retained concepts
    selft                 only the `share` of entries with the largest |theta * dL/dtheta| moves
    merge                 each concept is erased from theta_0 by itself, then the differences are merged (TIES,
                          arXiv:2306.01708; task arithmetic, arXiv:2212.04089; or their mean)

Deviations:
- gradient_projection: the authors multiply gradients by P = I - C (C^T C + rho I)^-1 C^T. Adam's step for a gradient in
  the range of P is not in it. project=update, the default, projects what the weights have moved by; project=gradient is
  the authors' way. P comes from a singular value decomposition in place of rho.
- gradient_projection: C has the state of each name's last word piece, and not the mean of its pieces; concepts are
  those of the task, where the authors ask a language model for two hundred.
- selft: the mask applies to what the weights have moved by, so that neither momentum nor weight decay moves others;
  dL/dtheta is that of the method itself on its first batches, and not of one of two fixed objectives.
- merge: one concept alone is trained as usual, and not trimmed.
"""

# D text width, N states, T differences.
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from unlearning.concepts import UnlearningTask
from unlearning.config.values import Count, NonNegative, Part, Template
from unlearning.erasures.base import Erasure
from unlearning.erasures.weight_patch import WeightPatch
from unlearning.errors import UserError
from unlearning.methods.closed_form import Positions, states
from unlearning.models.diffusion import DiffusionModel
from unlearning.training.regulariser import Constraint, Fit, Regulariser, Training, largest, masked, summed_gradients


class L1SP(Regulariser):
    """A penalty on the mean distance of the weights from their start.

    Args:
        weight: The weight of the penalty.
    """

    power: int = 1

    def __init__(self, weight: NonNegative = 50.0):
        self.weight = weight

    def penalty(self, theta: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> Tensor:
        total = torch.stack([(theta[name] - start[name]).abs().pow(self.power).sum() for name in start]).sum()
        return self.weight * total / sum(value.numel() for value in start.values())


class L2SP(L1SP):
    """As L1SP, of squares."""

    power = 2

    def __init__(self, weight: NonNegative = 25_000.0):
        super().__init__(weight)


class GradientProjection(Regulariser):
    """Holds what the maps that read text make of the retained concepts.

    Args:
        project: "update": what the weights have moved by; "gradient": the gradients, as the authors do.
        positions: Which states of a prompt are held: "last", "to_end" or "all" (methods/closed_form.py).
        template: How the name of a retained concept becomes a prompt; None for the task's template.
        most: Retained concepts, at most.
    """

    def __init__(
        self,
        project: Literal["update", "gradient"] = "update",
        positions: Positions = "last",
        template: Template | None = None,
        most: Count = 200,
    ):
        self.project, self.positions, self.template, self.most = project, positions, template, most
        self._hooks: list[RemovableHandle] = []

    def constraints(self, training: Training) -> Mapping[str, Constraint]:
        names = {f"{name}.weight" for name, _ in training.teacher.text_projections()}
        reading = names & training.pair.parameters.keys()
        if not reading:
            raise UserError(
                "gradient_projection holds the maps that read the text's states, and the student moves none of them: "
                "method.student.parameters has to match names such as unet.….attn2.to_k.weight."
            )
        P = self._projector(training.teacher, training.task)
        if self.project == "gradient":
            parameters = map(training.pair.parameters.__getitem__, reading)
            self._hooks = [p.register_hook(lambda gradient: gradient @ P) for p in parameters]
            return {}
        return dict.fromkeys(reading, lambda theta, start: start + (theta - start) @ P)

    def _projector(self, model: DiffusionModel, task: UnlearningTask) -> Tensor:
        """P (D, D), which maps the states of the retained concepts to zero."""
        prompts = [(self.template or task.template).format(concept.name) for concept in task.retain[: self.most]]
        if not prompts:
            raise UserError("gradient_projection needs concepts to retain; this dataset has none: dataset.retain=[…].")
        C = torch.cat(states(model, prompts, self.positions)).double().cpu().T  # (D, N)
        U, S, _ = torch.linalg.svd(C, full_matrices=False)
        U = U[:, S / S[0] > 1e-5]
        if U.shape[1] == len(C):
            raise UserError(
                f"The states of {len(prompts)} retained concepts span all {len(C)} dimensions of the text, so that "
                "nothing could move: fewer concepts (method.regulariser.most), or method.regulariser.positions=last."
            )
        return (torch.eye(len(C)) - U @ U.T).to(model.device, torch.float32)

    def fit(self, fit: Fit, model: DiffusionModel, task: UnlearningTask) -> Erasure:
        try:
            return fit(model, task)
        finally:
            for hook in self._hooks:
                hook.remove()
            self._hooks = []


class SelFT(Regulariser):
    """Moves only the most important entries.

    Args:
        share: The share of the trained entries that may change.
        batches: On how many batches the gradient is summed.
    """

    def __init__(self, share: Part = 0.05, batches: Count = 50):
        self.share, self.batches = share, batches

    def constraints(self, training: Training) -> Mapping[str, Constraint]:
        gradients = summed_gradients(training.losses(self.batches), training.pair.parameters)
        importance = {name: (theta * gradients[name]).abs() for name, theta in training.pair.start.items()}
        if not any(score.any() for score in importance.values()):
            raise UserError(
                "selft finds no weight of any importance: a student that starts at zero, such as a LoRA, has none. "
                "Train the model's own weights (student@method.student=cross_attention or full)."
            )
        return masked(largest(importance, self.share))


class Merge(Regulariser):
    """Erases each concept by itself, and merges the differences.

    Args:
        how: "ties", "sum" (task arithmetic) or "mean".
        scale: Factor of the merged difference.
        share: With "ties", the entries of each difference that are kept: the largest of every weight.
    """

    def __init__(self, how: Literal["ties", "sum", "mean"] = "ties", scale: NonNegative = 1.75, share: Part = 0.2):
        self.how, self.scale, self.share = how, scale, share

    def fit(self, fit: Fit, model: DiffusionModel, task: UnlearningTask) -> Erasure:
        if len(task.erase) == 1:
            return fit(model, task)
        patches = []
        for concept in task.erase:
            patch = fit(model, replace(task, erase=(concept,)))
            if not isinstance(patch, WeightPatch):
                raise UserError(
                    "merge is of weights, and this student is beside them: student@method.student=cross_attention."
                )
            patches.append(patch)
        merged, theta = {}, model.named_parameters()
        for name in patches[0].weights:
            start = theta[name].detach()
            tau = torch.stack([patch.weights[name] - start for patch in patches])
            merged[name] = start + self.scale * self._combined(tau)
        return WeightPatch(merged)

    def _combined(self, tau: Tensor) -> Tensor:
        """One difference (...) of T (T, ...)."""
        if self.how == "ties":
            return ties(tau, self.share)
        return tau.sum(0) if self.how == "sum" else tau.mean(0)


def ties(tau: Tensor, share: float) -> Tensor:
    """TIES of T differences tau (T, ...): trims each to its largest entries, elects a sign, averages those that agree.

    The sign of an entry is that of the trimmed sum; where that is 0, the sign which most entries have.
    """
    trimmed = torch.stack([torch.where(largest({"": t.abs()}, share)[""], t, 0) for t in tau])
    sign = trimmed.sum(0).sign()
    sign = torch.where(sign == 0, sign.sum().sign(), sign)
    agree = (trimmed.sign() == sign) & (trimmed != 0)
    return (trimmed * agree).sum(0) / agree.sum(0).clamp(min=1)

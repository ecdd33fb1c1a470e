"""Scrub, then solve: keeps the scrubber's trained change for the words of its search, and for no other word. Ours.

The scrubber (methods/scrubber.py) trains every map W through which text enters the denoiser, to W_S. This also changes
the images of all other prompts. Its search knows which words stand for the concept. So each map becomes the minimiser
over W' of

    sum_c || W' c - W_S c ||^2  +  s sum_r || W' r - W r ||^2  +  lamb || W' - W ||_F^2,

over the text states c of these words, and r of all other words. It is

    W' = W + (W_S - W) P,   P = A (A + s R + lamb I)^-1,   A = sum_c c c^T,   R = sum_r r r^T:

the trained change, projected by a P that does not depend on it.
"""

# N states, D text width, O output width.
import re
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from unlearning.concepts import UnlearningTask
from unlearning.config.values import Natural, NonNegative, Positive
from unlearning.erasures.weight_patch import WeightPatch
from unlearning.errors import UserError
from unlearning.methods.base import Method
from unlearning.methods.closed_form import projections, states
from unlearning.methods.scrubber import Scrubber
from unlearning.models.diffusion import DiffusionModel
from unlearning.scrubbing.words import in_all_templates, in_turn
from unlearning.training.student import Weights


class ScrubSolve(Method):
    """Trains a scrubber, then solves for the part of its change that is kept.

    Args:
        scrubber: With conditioning=words or caption, and a student that trains the maps which read the text. The
            changes of other weights are discarded.
        preserve_scale: s.
        lamb: The weight of the distance to W.
        retained: Maximum number of other words, each in one template.
    """

    def __init__(
        self,
        *,
        scrubber: Scrubber,
        preserve_scale: NonNegative = 0.1,
        lamb: Positive = 0.5,
        retained: Natural = 2000,
    ):
        self.scrubber, self.preserve_scale, self.lamb, self.retained = scrubber, preserve_scale, lamb, retained

    def fit(self, model: DiffusionModel, task: UnlearningTask) -> WeightPatch:
        maps = self._maps(model)
        trained, start = cast(WeightPatch, self.scrubber.fit(model, task)).weights, model.named_parameters()
        self.figures, rows = self.scrubber.figures, self.scrubber.rows
        P = self.projector(model, rows.words, rows.others)
        return WeightPatch({name: _projected(start[name].detach(), trained[name], P) for name in maps})

    def _maps(self, model: DiffusionModel) -> list[str]:
        """The names of the maps that the scrubber trains. Raises UserError if there are none, or it finds no words."""
        student = self.scrubber.moving
        if self.scrubber.conditioning not in ("words", "caption"):
            raise UserError("scrub_solve keeps what words read: method.scrubber.conditioning=words, or caption.")
        if not isinstance(student, Weights):
            raise UserError("scrub_solve edits weights: student@method.scrubber.student=cross_attention.")
        maps = [f"{name}.weight" for name in projections(model)]
        if not (trained := [name for name in maps if re.search(student.parameters, name)]):
            raise UserError(
                f"scrub_solve keeps what words read in the maps that read text, {maps[0]} and the like, and "
                "method.scrubber.student.parameters matches none of them."
            )
        return trained

    @torch.no_grad()
    def projector(self, model: DiffusionModel, words: Sequence[str], others: Sequence[str]) -> Tensor:
        """P (D, D), float64, for the words of the search and for other words."""
        A = _moment(states(model, in_all_templates(words), "to_end"))
        R = _moment(states(model, ["", *in_turn(others, self.retained)], "all"))
        ridge = self.lamb * torch.eye(len(A), dtype=A.dtype, device=A.device)
        return torch.linalg.solve(A + self.preserve_scale * R + ridge, A, left=False)


def _moment(some: Sequence[Tensor]) -> Tensor:
    """sum_n c_n c_n^T (D, D), float64, of states (N, D) of several prompts."""
    first, *others = some
    total = first.double().T @ first.double()
    for c in others:
        total += c.double().T @ c.double()
    return total


def _projected(W: Tensor, W_S: Tensor, P: Tensor) -> Tensor:
    """W + (W_S - W) P, (O, D)."""
    return (W.double() + (W_S.double() - W.double()) @ P).to(W.dtype)

"""DP-style: Closed-Form Concept Erasure via Double Projections (Zhang et al., CVPR 2026). https://arxiv.org/abs/2604.10032

The columns of S are states of what is preserved. The anchor of a state c of the erased concept is the part of it that
they span, and every map W through which the prompt enters the denoiser gets an update in their left null space, of
which U_2 is an orthonormal basis:

    c* = S (S^T S)^+ S^T c,      x = U_2^T c,      dW = W (c* - c) x^T / ||x||^2 U_2^T.

Two identities are exact: dW c = W (c* - c), so that W + dW makes of c what W makes of c*, and dW s = 0 for each s of S.
As c* - c is -U_2 x, this is W + dW = W (I - Q), where Q projects onto U_2 x: onto what c has that S has not. For states
of several concepts, Q projects onto all these directions, and both identities hold for each.

DP-style, because it follows descriptions of the paper and no code of the authors. They leave open which states are
taken, which are ours: a concept's from its last word piece to the end of the sequence, as UCE's, and of what is
preserved (the null prompt, the retained concepts) the same. So many states span the width of the text; the paper
truncates the decomposition of S, and we do where its squared singular values add up to `energy` of their sum. The many
states of one concept also span many directions outside of S, most of them noise: Q holds the fewest that have
`erased_energy` of U_2 x. 0.6 and 0.9 were chosen on emoji_unet (rabbit, clock). The identities are then those of what
is held; with both at 1 they are exact. A task's anchor is not used.
"""

# D text width, N states.
from typing import Literal

import torch
from torch import Tensor

from unlearning.concepts import UnlearningTask
from unlearning.config.values import Part
from unlearning.erasures.weight_patch import WeightPatch
from unlearning.errors import UserError
from unlearning.methods.base import Method
from unlearning.methods.closed_form import edited, projections, states
from unlearning.models.diffusion import DiffusionModel

NOTHING = 1e-6  # the share of a state's norm that rounding leaves of nothing


class DP(Method):
    """Closed form, by two projections.

    Args:
        positions: The states of a prompt: at its last word piece, or from there "to_end".
        energy: The share of the sum of squared singular values of S that its basis holds; 1 for all of S.
        erased_energy: The same of U_2 x, for Q.
        preserve_null: Whether the null prompt is preserved.
    """

    def __init__(
        self,
        *,
        positions: Literal["to_end", "last"] = "to_end",
        energy: Part = 0.6,
        erased_energy: Part = 0.9,
        preserve_null: bool = True,
    ):
        self.positions, self.energy, self.erased_energy = positions, energy, erased_energy
        self.preserve_null = preserve_null

    @torch.no_grad()
    def fit(self, model: DiffusionModel, task: UnlearningTask) -> WeightPatch:
        maps = projections(model)
        c = torch.cat(states(model, [concept.name for concept in task.erase], self.positions)).double()
        preserved = [" "] * self.preserve_null + [concept.name for concept in task.retain]  # SDXL's "" is zeros
        S = torch.cat([c[:0], *states(model, preserved, self.positions)]).double()
        outside = c - c @ projector(S, self.energy)
        if (outside.norm(dim=1) <= NOTHING * c.norm(dim=1)).all():
            raise UserError(
                "What is preserved spans every state of the erased concepts, which leaves DP nothing to erase: a "
                "smaller method.energy, method.positions=last, or fewer concepts to retain."
            )
        return edited(maps, torch.eye(c.shape[1]).to(c) - projector(outside, self.erased_energy))


def projector(S: Tensor, energy: float) -> Tensor:
    """P (D, D): onto the span of states S (N, D), or of the fewest singular directions that hold `energy` of it."""
    _, singular, directions = torch.linalg.svd(S, full_matrices=False)
    held = singular.square().cumsum(0)
    count = int((held < energy * held[-1:]).sum()) + 1 if len(S) else 0
    basis = directions[:count][singular[:count] > NOTHING * singular[:1]]
    return basis.T @ basis

"""RECE: Reliable and Efficient Concept Erasure (Gong et al., ECCV 2024). https://arxiv.org/abs/2407.12383

UCE first. Then, several times: text states c' are found that bring the concept's states c back, and erased as well.
With W the maps of the unedited model and W' those edited so far,

    c'  = argmin_c'  sum_W || W' c' - W c ||^2 + lamb_c || c' ||^2
        = ( lamb_c I + sum_W W'^T W' )^-1 ( sum_W W'^T W ) c,
    W'' = argmin_W'' s_e sum || W'' c' - W' c* ||^2 + s_p sum_j || W'' c_j - W' c_j ||^2 + lamb || W'' - W' ||_F^2,

where c* are the anchor's states and c_j those of what is preserved. Every edit is W E with one E for all maps, so that
all of it is solved in the width of the text.

The defaults are the paper's for nudity: three repetitions and lamb_c = 0.1; s_p = lamb = 0.1 in all repetitions. For
artists and hard objects it is `repetitions=1 lamb_c=0.001`, for easy objects `repetitions=1`. As in the released code,
c and c* are all states of a prompt, from the start of the text to the end of the padding, and W' c* is the target, of
the maps as they were before the repetition.

Deviations: the released code keeps the repetition at which its detector finds the concept least often in images of a
validation set; here it is always the last. It preserves the null prompt (for objects and artists also what UCE
preserves); here it is what UCE preserves. Where UCE leaves nothing of the concept, the authors do not apply RECE.
"""

# D text width, N states.
import torch
from torch import Tensor

from unlearning.concepts import UnlearningTask
from unlearning.config.values import Natural, NonNegative, Positive
from unlearning.methods.closed_form import closed_form, pairs, projections, states
from unlearning.methods.uce import UCE
from unlearning.models.diffusion import DiffusionModel


class RECE(UCE):
    """UCE, then again for what brings the concept back.

    Args:
        repetitions: How often states c' are found and erased; 0 is UCE.
        lamb_c: The weight of the norm of c'.
        again_preserve_scale, again_lamb: s_p and lamb of the repetitions.
        uce: UCE's arguments, for its own edit. The map of the pooled embedding gets only this one.
    """

    def __init__(
        self,
        *,
        repetitions: Natural = 3,
        lamb_c: Positive = 0.1,
        again_preserve_scale: NonNegative = 0.1,
        again_lamb: Positive = 0.1,
        **uce,
    ):
        super().__init__(**uce)
        self.repetitions, self.lamb_c = repetitions, lamb_c
        self.again_preserve_scale, self.again_lamb = again_preserve_scale, again_lamb

    def solve(self, model: DiffusionModel, task: UnlearningTask) -> Tensor:
        E, G = super().solve(model, task), gram(model)
        c, c_star = pairs(model, *self.prompts(task), "all")
        c_j = torch.cat([c[:0], *states(model, self.preserved(task), "all")])
        scale = torch.tensor([self.erase_scale] * len(c) + [self.again_preserve_scale] * len(c_j), device=c.device)
        for _ in range(self.repetitions):
            back = torch.cat([returning(c, E, G, self.lamb_c), c_j])
            E = E @ closed_form(back, torch.cat([c_star, c_j]), scale, self.again_lamb)
        return E


def gram(model: DiffusionModel) -> Tensor:
    """G (D, D), float64: sum_W W^T W over the maps through which the prompt enters the denoiser."""
    return torch.stack([W.T @ W for W in (m.weight.double() for m in projections(model).values())]).sum(0)


def returning(c: Tensor, E: Tensor, G: Tensor, lamb: float) -> Tensor:
    """c' (N, D) of states c (N, D): sum_W || W E c' - W c ||^2 + lamb || c' ||^2 is least; G is sum_W W^T W."""
    ridge = lamb * torch.eye(len(G), dtype=G.dtype, device=G.device)
    return torch.linalg.solve(E.T @ G @ E + ridge, E.T @ G @ c.double().T).T

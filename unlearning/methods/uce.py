"""UCE: Unified Concept Editing in Diffusion Models (Gandikota et al., 2024). https://arxiv.org/abs/2308.14761

Every map W through which the prompt enters the denoiser becomes the minimiser, in closed form (eq. 7), of

    s_e sum_i || W' c_i - W c*_i ||^2  +  s_p sum_j || W' c_j - W c_j ||^2  +  lamb || W' - W ||_F^2,

over erased concepts c_i with anchors c*_i, and retained concepts c_j.

As in the authors' script, c is the text encoder's state at the concept's last word piece. Deviation: the system is
solved in float64.
"""

# N concepts, D text width, O output width.
import torch
from torch import Tensor

from unlearning.erasures.weight_patch import WeightPatch
from unlearning.errors import UserError
from unlearning.methods.base import Method


def closed_form(W: Tensor, c: Tensor, c_star: Tensor, scale: Tensor, lamb: float) -> Tensor:
    """W' (O, D), of W (O, D), inputs c (N, D), the inputs c_star (N, D) they should act like, weights scale (N,)."""
    W, c, c_star = W.double(), c.double(), c_star.double()
    weighted = scale.double()[:, None] * c
    eye = torch.eye(W.shape[1], dtype=W.dtype, device=W.device)
    return torch.linalg.solve(c.T @ weighted + lamb * eye, W @ (c_star.T @ weighted + lamb * eye), left=False)


class UCE(Method):
    """
    Args:
        lamb: Weight of staying where W was; the larger, the less is changed.
        erase_scale, preserve_scale: s_e and s_p.
        templates: What a concept's name is put into; the paper's extended setting has five.
    """

    def __init__(
        self,
        *,
        lamb: float = 0.5,
        erase_scale: float = 1.0,
        preserve_scale: float = 1.0,
        templates: tuple[str, ...] = ("{}",),
    ):
        self.lamb, self.erase_scale, self.preserve_scale, self.templates = lamb, erase_scale, preserve_scale, templates

    @torch.no_grad()
    def fit(self, model, task) -> WeightPatch:
        projections = dict(model.text_projections())
        if not projections:
            raise UserError(f"{model.name} reads no text: there is no map that UCE could edit. Choose another method.")

        def states(words: list[str]) -> Tensor:
            prompts = [template.format(word) for template in self.templates for word in words]
            return model.encode_prompts(prompts).embeds[torch.arange(len(prompts)), model.last_token(prompts)]

        retain = [concept.name for concept in task.retain]
        c = states([concept.name for concept in task.erase] + retain)
        c_star = states([concept.anchor or " " for concept in task.erase] + retain)
        scale = torch.tensor([self.erase_scale] * len(task.erase) + [self.preserve_scale] * len(retain))
        scale = scale.repeat(len(self.templates)).to(c.device)
        return WeightPatch({
            f"{name}.weight": closed_form(m.weight, c, c_star, scale, self.lamb).to(m.weight.dtype)
            for name, m in projections.items()
        })  # fmt: skip

"""UCE: Unified Concept Editing in Diffusion Models (Gandikota et al., 2024). https://arxiv.org/abs/2308.14761

Every map W through which the prompt enters the denoiser becomes the minimiser, in closed form (eq. 7), of

    s_e sum_i || W' c_i - W c*_i ||^2  +  s_p sum_j || W' c_j - W c_j ||^2  +  lamb || W' - W ||_F^2,

over text states c_i of the erased concepts, c*_i of their anchors, and c_j of what is preserved.

The paper does not say which states these are. The defaults follow the authors' code of 2023, with which the published
numbers were made: c_i are all states from the concept's last word piece to the end of the sequence, c*_i those of the
anchor from its own last word piece on, and c_j all states of the null prompt and of the task's retained concepts;
s_p is max(0.1, 1 / preserved prompts). The authors' script of 2025 takes only the state at the last word piece,
preserves no null prompt, and sets s_p = 1. It is `positions=last preserve_null=false preserve_scale=1`. Both set
s_e = 1 and lamb = 0.5. Both can add five prompts for each concept and by default do not: `templates=objects` or `art`.
SDXL, SD3 and Flux also read a pooled embedding of the prompt, whose map neither edits. `pooled=true` (ours) solves the
same system for it, over the pooled embeddings of the same prompts.

Deviations: the system is solved in float64. Templates also apply to the anchor, as in 2025 (in 2023 they do not). For
artists, the code of 2023 preserves all others of a list of 1734 by default; here the task says what is preserved.
"""

from typing import Literal

import torch
from torch import Tensor

from unlearning.concepts import UnlearningTask
from unlearning.config.values import NonNegative, Positive, Template
from unlearning.erasures.weight_patch import WeightPatch
from unlearning.methods.base import Method
from unlearning.methods.closed_form import closed_form, edited, pairs, pooled, pooled_projections, projections, states
from unlearning.models.diffusion import DiffusionModel

TEMPLATES = {
    "objects": ("{}", "image of {}", "photo of {}", "portrait of {}", "picture of {}", "painting of {}"),
    "art": ("{}", "painting by {}", "art by {}", "artwork by {}", "picture by {}", "style of {}"),
}


class UCE(Method):
    """Closed form.

    Args:
        positions: The states of a prompt that are edited: "to_end" or "last" (see above).
        templates: Templates for the names of concepts and anchors; "objects" or "art" for the authors' six.
        erase_scale: s_e.
        preserve_scale: s_p; None for max(0.1, 1 / preserved prompts).
        preserve_null: Whether the null prompt is preserved.
        lamb: The weight of the distance to W.
        pooled: Whether the map of the pooled embedding is edited too.
    """

    def __init__(
        self,
        *,
        positions: Literal["to_end", "last"] = "to_end",
        templates: tuple[Template, ...] | Literal["objects", "art"] = ("{}",),
        erase_scale: Positive = 1.0,
        preserve_scale: NonNegative | None = None,
        preserve_null: bool = True,
        lamb: Positive = 0.5,
        pooled: bool = False,
    ):
        self.positions, self.lamb, self.pooled = positions, lamb, pooled
        self.templates = TEMPLATES[templates] if isinstance(templates, str) else templates
        self.erase_scale, self.preserve_scale, self.preserve_null = erase_scale, preserve_scale, preserve_null

    @torch.no_grad()
    def fit(self, model: DiffusionModel, task: UnlearningTask) -> WeightPatch:
        patch = edited(projections(model), self.solve(model, task))
        maps = pooled_projections(model) if self.pooled else {}
        if not maps:
            return patch
        texts = (*self.prompts(task), self.preserved(task))
        E = self.minimiser(task, *(pooled(model, prompts) for prompts in texts))
        return WeightPatch({**patch.weights, **edited(maps, E).weights})

    def solve(self, model: DiffusionModel, task: UnlearningTask) -> Tensor:
        """E (D, D), float64: the minimiser is W E for every map W."""
        c, c_star = pairs(model, *self.prompts(task), self.positions)
        positions = "all" if self.positions == "to_end" else self.positions
        c_j = torch.cat([c[:0], *states(model, self.preserved(task), positions)])
        return self.minimiser(task, c, c_star, c_j)

    def minimiser(self, task: UnlearningTask, c: Tensor, c_star: Tensor, c_j: Tensor) -> Tensor:
        """E for the embeddings (N, D) of the erased concepts, their anchors, and what is preserved."""
        s_p = max(0.1, 1 / max(1, len(self.preserved(task)))) if self.preserve_scale is None else self.preserve_scale
        scale = torch.tensor([self.erase_scale] * len(c) + [s_p] * len(c_j), device=c.device)
        return closed_form(torch.cat([c, c_j]), torch.cat([c_star, c_j]), scale, self.lamb)

    def prompts(self, task: UnlearningTask) -> tuple[list[str], list[str]]:
        """The prompts of the erased concepts, and those of their anchors."""
        filled = [(template, concept) for template in self.templates for concept in task.erase]
        # " " has the states of the null prompt, which SDXL replaces by zeros.
        anchors = [template.format(concept.anchor or " ") for template, concept in filled]
        return [template.format(concept.name) for template, concept in filled], anchors

    def preserved(self, task: UnlearningTask) -> list[str]:
        """The prompts of what is preserved."""
        return [""] * self.preserve_null + [concept.name for concept in task.retain]

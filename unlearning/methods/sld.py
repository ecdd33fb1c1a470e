"""SLD: Safe Latent Diffusion (Schramowski et al., 2023). https://arxiv.org/abs/2211.05105

At each sampling step a third prediction eps_S, of a safety concept S, joins eps_0 (null prompt) and eps_c (prompt):

    mu    = min(1, s_S |eps_c - eps_S|)  where eps_c - eps_S < lambda_S,  0 elsewhere
    gamma = mu (eps_S - eps_0) + s_m nu
    nu   <- beta_m nu + (1 - beta_m) gamma,  nu = 0 at first
    eps   = eps_0 + s (eps_c - eps_0 - gamma),  without gamma in the first delta steps.

All products are element-wise. nu is also updated in the first delta steps. delta counts sampling steps, as in the
authors' code and in diffusers' StableDiffusionPipelineSafe, which draws the same images. Where a trajectory takes a
prediction only at every few steps (sampler.skim), delta counts all steps, and nu is updated at each prediction.

Deviation: a model that predicts v or flow has v or flow in the place of eps, and lambda_S and s_S apply to differences
of these.
"""

# B batch, C H W latent shape.
from dataclasses import dataclass

import torch
from torch import Tensor

from unlearning.concepts import UnlearningTask
from unlearning.config.values import Finite, Natural, NonNegative, Share
from unlearning.erasures.guidance_edit import GuidanceEdit
from unlearning.methods.base import Method
from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.guidance import Guidance, Scale, Walk
from unlearning.sampling.guidance import branches


@dataclass(frozen=True)
class SafetyGuidance(Guidance):
    """Classifier-free guidance that also leads away from a safety concept.

    Args:
        concept: The text of S.
        warmup_steps: delta.
        safety_scale: s_S.
        threshold: lambda_S.
        momentum_scale: s_m.
        momentum_beta: beta_m.
    """

    concept: str
    warmup_steps: Natural
    safety_scale: NonNegative
    threshold: Finite
    momentum_scale: Share
    momentum_beta: Share

    @torch.no_grad()
    def begin(self, model: DiffusionModel, c: Conditioning, scale: Scale) -> Walk:
        null = model.encode_prompts([""])
        safety = model.encode([self.concept], edits=())  # no edit of the text may hide S
        nu: Tensor | float = 0.0

        def guided(x_t: Tensor, t: Tensor, c: Conditioning, step: int) -> Tensor:
            nonlocal nu
            eps_0, eps_S, eps_c = branches(model, x_t, t, null, safety, c)
            gamma = self.mask(eps_c - eps_S) * (eps_S - eps_0) + self.momentum_scale * nu
            nu = self.momentum_beta * nu + (1 - self.momentum_beta) * gamma
            return eps_0 + scale * (eps_c - eps_0 - (step >= self.warmup_steps) * gamma)

        return Walk(c, guided)

    def mask(self, difference: Tensor) -> Tensor:
        """mu (B, C, H, W), of eps_c - eps_S."""
        return (self.safety_scale * difference.abs()).clamp(max=1) * (difference < self.threshold)


class SLD(Method):
    """Safety guidance for the erased concepts.

    Args:
        concept: The text of S; None for the names of the erased concepts, joined by ", ".
        warmup_steps, safety_scale, threshold, momentum_scale, momentum_beta: As in SafetyGuidance. The paper's four
            strengths (weak, medium, strong, max) differ in these numbers only.
    """

    writable = False

    def __init__(
        self,
        *,
        concept: str | None = None,
        warmup_steps: Natural = 10,
        safety_scale: NonNegative = 1000.0,
        threshold: Finite = 0.01,
        momentum_scale: Share = 0.3,
        momentum_beta: Share = 0.4,
    ):
        self.concept = concept
        self.settings = (warmup_steps, safety_scale, threshold, momentum_scale, momentum_beta)

    def fit(self, model: DiffusionModel, task: UnlearningTask) -> GuidanceEdit:
        concept = self.concept or ", ".join(concept.name for concept in task.erase)
        return GuidanceEdit(SafetyGuidance(concept, *self.settings))

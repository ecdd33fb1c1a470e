"""Classifier-free guidance, negative prompts, and the functions that both use.

Guidances are linear in the prediction, so that the same rule serves epsilon, v and flow.
"""

# B batch, C H W latent shape; eps_c: prediction given the prompt; eps_0: given the null prompt.
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unlearning.errors import UserError
from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.guidance import Guidance, Scale, Walk


def begin(model: DiffusionModel, c: Conditioning, scale: Scale) -> Walk:
    """A walk of the model's own guidance, which is classifier-free unless an erasure has changed it.

    Raises:
        UserError: If the guidance changes nothing at this scale.
    """
    guidance = model.guidance or ClassifierFree()
    check_scale(guidance, scale)
    return guidance.begin(model, c, scale)


def check_scale(guidance: Guidance | None, scale: Scale) -> None:
    """Raises UserError at a guidance scale of 1, if the guidance changes nothing there."""
    if guidance and guidance.needs_null and torch.as_tensor(scale).eq(1).any():
        raise UserError(
            f"{type(guidance).__name__} acts in the place of the null prompt, which a guidance scale of 1 leaves out: "
            "the images would be those of the unedited model. Set sampler.guidance_scale above 1; a model with a "
            "guidance scale of its own as an input (model.embedded_guidance) then takes twice the time."
        )


def classifier_free(
    model: DiffusionModel, x_t: Tensor, t: Tensor, c: Conditioning, null: Conditioning, scale: Scale
) -> Tensor:
    """eps_0 + s (eps_c - eps_0)  (Ho & Salimans, 2022), both branches in one call of the denoiser.

    `null` is one row or B rows; t is () or (B,). Both branches use the gains of side modules in c.
    """
    if not torch.is_tensor(scale) and scale == 1:
        return model.predict(x_t, t, c)
    eps_0, eps_c = branches(model, x_t, t, null, c)
    return eps_0 + scale * (eps_c - eps_0)


def branches(model: DiffusionModel, x_t: Tensor, t: Tensor, *conditionings: Conditioning) -> tuple[Tensor, ...]:
    """The prediction at (x_t, t) under each conditioning, (B, C, H, W) each, in one call of the denoiser.

    A conditioning of one row is expanded to B rows. All branches use the gains of side modules in the last one, that of
    the prompts.
    """
    n, B = len(conditionings), len(x_t)
    c = Conditioning.cat([
        (c if len(c) == B else c.expand(B)).with_gains(conditionings[-1].gains) for c in conditionings
    ])  # fmt: skip
    t = t if t.ndim == 0 else t.repeat(n)
    return model.predict(torch.cat([x_t] * n), t, c).chunk(n)


@dataclass(frozen=True)
class ClassifierFree(Guidance):
    """Classifier-free guidance with the null prompt."""

    def begin(self, model: DiffusionModel, c: Conditioning, scale: Scale) -> Walk:
        """A walk with the null prompt."""
        null = model.encode_prompts([""])
        return Walk(c, lambda x_t, t, c, step: classifier_free(model, x_t, t, c, null.at(step), scale))


@dataclass(frozen=True)
class NegativePrompt(Guidance):
    """eps_n + s (eps_c - eps_n): a negative prompt replaces the null prompt, so that sampling is led away from it.

    Args:
        prompt: The negative prompt.
    """

    prompt: str
    needs_null: ClassVar[bool] = True

    def begin(self, model: DiffusionModel, c: Conditioning, scale: Scale) -> Walk:
        """A walk with the negative prompt."""
        negative = model.encode_prompts([self.prompt])
        return Walk(c, lambda x_t, t, c, step: classifier_free(model, x_t, t, c, negative.at(step), scale))

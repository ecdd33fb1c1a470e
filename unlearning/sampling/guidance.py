"""How the denoiser's predictions are combined at each sampling step.

A guidance is a frozen dataclass. It begins with a batch of prompts and gives a `Walk`, which is called with (x_t, t) at
each step and may keep state: warm-up, momentum, decisions by prompt. Guidances are linear in the prediction, so
that the same rule serves epsilon, v and flow.
"""

# B batch, C H W latent shape; eps_c: prediction given the prompt; eps_0: given the null prompt.
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from unlearning.errors import UserError
from unlearning.models.diffusion import Conditioning, DiffusionModel

Scale = float | Tensor  # the guidance scale: a number, or one for each row, (B, 1, 1, 1)


class Walk:
    """One batch on its way from noise to images.

    Args:
        c: The prompts' conditioning.
        predict: Maps (x_t (B, C, H, W), t, c, step) to the combined prediction; steps count from 0.
        decisions: What the guidance decided about each prompt, for the manifest: {"w": [2.0, -1.0, ...]}.
    """

    def __init__(
        self,
        c: Conditioning,
        predict: Callable[[Tensor, Tensor, Conditioning, int], Tensor],
        decisions: Mapping[str, Sequence[float]] | None = None,
    ):
        self._c, self._predict, self.decisions = c, predict, decisions or {}
        self.step = 0

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The combined prediction at (x_t, t), (B, C, H, W); counts the step."""
        prediction = self._predict(x_t, t, self._c.at(self.step), self.step)
        self.skip()
        return prediction

    def skip(self, count: int = 1) -> None:
        """Counts steps at which no prediction is needed."""
        self.step += count


class Guidance(ABC):
    """
    Attributes:
        needs_null: Whether it acts on the null prompt's branch alone, which a guidance scale of 1 leaves out.
    """

    needs_null: ClassVar[bool] = False

    @abstractmethod
    def begin(self, model: DiffusionModel, c: Conditioning, scale: Scale) -> Walk:
        """A walk for the prompts of c."""

    def of(self, adapter: str) -> "Guidance":
        """This guidance, for the set of side modules `adapter`; by default it needs none."""
        return self


def begin(model: DiffusionModel, c: Conditioning, scale: Scale) -> Walk:
    """A walk of the model's own guidance, which is classifier-free unless an erasure has changed it.

    Raises:
        UserError: If the guidance changes nothing at this scale.
    """
    guidance = model.guidance or ClassifierFree()
    check_scale(guidance, scale)
    return guidance.begin(model, c, scale)


def check_scale(guidance: Guidance | None, scale: Scale) -> None:
    """Raises UserError for a guidance that changes nothing at a guidance scale of 1, and is given one."""
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

    `null` is one row or B rows; t is () or (B,). Both branches get as much of the side modules as c says.
    """
    if not torch.is_tensor(scale) and scale == 1:
        return model.predict(x_t, t, c)
    eps_0, eps_c = branches(model, x_t, t, null, c)
    return eps_0 + scale * (eps_c - eps_0)


def branches(model: DiffusionModel, x_t: Tensor, t: Tensor, *conditionings: Conditioning) -> tuple[Tensor, ...]:
    """The prediction at (x_t, t) under each conditioning, (B, C, H, W) each, in one call of the denoiser.

    A conditioning of one row stands for B. All get as much of the side modules as the last one, the prompts', says.
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
        negative = model.encode_prompts([self.prompt])
        return Walk(c, lambda x_t, t, c, step: classifier_free(model, x_t, t, c, negative.at(step), scale))

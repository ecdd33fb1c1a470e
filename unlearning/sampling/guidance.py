"""How the denoiser's predictions are combined at a sampling step.

A guidance is a frozen dataclass called with the model, x_t (B, C, H, W), t, the prompts' and the null prompt's
conditioning and the guidance scale s, a number or (B, 1, 1, 1). It is linear in the prediction, so the same rule serves
epsilon, v and flow.
"""

# eps_c: prediction given the prompt; eps_0: given the null prompt.
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor


class Guidance(ABC):
    # What a guidance decided about each prompt of a batch, for the manifest: {"w": [2.0, -1.0, ...]}.
    decisions: ClassVar[dict[str, list[float]]] = {}

    def for_prompts(self, model, c, scale: float | Tensor) -> "Guidance":
        """The rule for a batch of prompts, asked for once before their first step; by default itself."""
        return self

    @abstractmethod
    def __call__(self, model, x_t: Tensor, t: Tensor, c, null, scale: float | Tensor) -> Tensor: ...


@dataclass(frozen=True)
class ClassifierFree(Guidance):
    """eps_0 + s (eps_c - eps_0)  (Ho & Salimans, 2022), both branches in one call of the denoiser."""

    def __call__(self, model, x_t: Tensor, t: Tensor, c, null, scale: float | Tensor) -> Tensor:
        if not torch.is_tensor(scale) and scale == 1:
            return model.predict(x_t, t, c)
        t = t if t.ndim == 0 else torch.cat([t, t])
        eps_0, eps_c = model.predict(torch.cat([x_t, x_t]), t, type(c).cat([null, c])).chunk(2)
        return eps_0 + scale * (eps_c - eps_0)


@dataclass(frozen=True)
class NegativePrompt(Guidance):
    """eps_n + s (eps_c - eps_n): the null prompt gives way to the concept, and sampling is led away from it."""

    prompt: str

    def __call__(self, model, x_t: Tensor, t: Tensor, c, null, scale: float | Tensor) -> Tensor:
        negative = model.encode_prompts([self.prompt]).expand(len(x_t))
        return ClassifierFree()(model, x_t, t, c, negative, scale)

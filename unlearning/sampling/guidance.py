"""How the denoiser's predictions are combined at a sampling step.

A guidance is a frozen dataclass called with the model, x_t (B, C, H, W), t, the prompts' and the null prompt's
conditioning and the guidance scale s. It is linear in the prediction, so the same rule serves epsilon, v and flow.
"""

# eps_c: prediction given the prompt; eps_0: given the null prompt.
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Guidance(Protocol):
    def __call__(self, model, x_t: Tensor, t: Tensor, c, null, scale: float) -> Tensor: ...


@dataclass(frozen=True)
class ClassifierFree:
    """eps_0 + s (eps_c - eps_0)  (Ho & Salimans, 2022), both branches in one call of the denoiser."""

    def __call__(self, model, x_t: Tensor, t: Tensor, c, null, scale: float) -> Tensor:
        if scale == 1:
            return model.predict(x_t, t, c)
        t = t if t.ndim == 0 else torch.cat([t, t])
        eps_0, eps_c = model.predict(torch.cat([x_t, x_t]), t, type(c).cat([null, c])).chunk(2)
        return eps_0 + scale * (eps_c - eps_0)


@dataclass(frozen=True)
class NegativePrompt:
    """eps_n + s (eps_c - eps_n): the null prompt gives way to the concept, and sampling is led away from it."""

    prompt: str

    def __call__(self, model, x_t: Tensor, t: Tensor, c, null, scale: float) -> Tensor:
        negative = model.encode_prompts([self.prompt]).expand(len(x_t))
        return ClassifierFree()(model, x_t, t, c, negative, scale)

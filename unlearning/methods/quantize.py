"""Quantizes an erased model: does the concept come back?

In language models, 4 bits bring erased knowledge back (Zhang et al., ICLR 2025, arXiv:2410.16454).

The weights W of linear maps and convolutions are rounded to the nearest of 2^bits - 1 levels, symmetrically about 0:

    W' = s round(W / s),    s = max |W| / (2^(bits - 1) - 1),

with a scale s for every `group` of weights of the same output, or, without groups, for every output. Weight-only
quantization computes with these values. Here they are stored in the model's own precision: this runs on any machine,
but no faster. Adapters and other edits do not change.
"""

# W (outputs, inputs), G groups of a row.
from typing import Annotated

import torch
import torch.nn.functional as F
from annotated_types import Ge, Le
from torch import Tensor, nn

from unlearning.concepts import UnlearningTask
from unlearning.config.values import Count
from unlearning.erasures.weight_patch import WeightPatch
from unlearning.methods.base import Method
from unlearning.models.diffusion import DiffusionModel


class Quantization(Method[DiffusionModel]):
    """Rounds the weights.

    Args:
        bits: Bits of each weight.
        group: Weights that share a scale; None for all that enter an output.
        text_encoders: Whether the text encoders are rounded too.
    """

    def __init__(
        self, *, bits: Annotated[int, Ge(2), Le(16)] = 8, group: Count | None = None, text_encoders: bool = False
    ):
        self.bits, self.group, self.text_encoders = bits, group, text_encoders

    @torch.no_grad()
    def fit(self, model: DiffusionModel, task: UnlearningTask) -> WeightPatch:
        denoiser = [name for name, part in model.parts.items() if part is model.denoiser]
        parts = (*denoiser, *(model.text_encoders if self.text_encoders else ()))
        rounded = {
            f"{name}.weight": self.rounded(layer.weight)
            for name, layer in model.named_modules().items()
            if name.partition(".")[0] in parts and isinstance(layer, nn.Linear | nn.Conv2d)
        }
        return WeightPatch(rounded)

    def rounded(self, weight: Tensor) -> Tensor:
        """W' of weights (outputs, ...)."""
        rows = weight.float().flatten(1)
        size = self.group or rows.shape[1]
        groups = F.pad(rows, (0, -rows.shape[1] % size)).unflatten(1, (-1, size))  # (outputs, G, size)
        levels = 2 ** (self.bits - 1) - 1
        scale = groups.abs().amax(2, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny) / levels
        whole = (groups / scale).round().mul(scale).flatten(1)[:, : rows.shape[1]]
        return whole.reshape(weight.shape).to(weight.dtype)

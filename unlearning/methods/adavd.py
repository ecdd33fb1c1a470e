"""AdaVD: Precise, Fast, and Low-cost Concept Erasure in Value Space (Wang et al., CVPR 2025).

https://arxiv.org/abs/2412.06143

Training-free. In every cross-attention layer, each value v_j of a prompt loses its part along the value v* of the
erased concept; by a shift factor g it loses the more, the more alike the two are:

    v_j <- v_j - g(cos(v*, v_j)) <v*, v_j> / ||v*||^2 v*,          g(x) = s / (1 + exp(-p (x - b))).

v* is the value of the concept's last word piece, and the same at every place j; the start of the text keeps its value.
Of several concepts, the part in the span of all v*_m is taken away: the projection is sum_m a_m v*_m, and g weighs each
summand. A value that is orthogonal to every v*_m does not change. Values depend on the text alone, not on the image or
the step, so that the models are those with cross-attention; joint attention (SD3, Flux) has no such values.

The defaults are those of the released notebook: p = 100, b = 0.93, s = 2. The released script has no shift factor by
default, `shift=false`: g = 1.

Paper and code: in the code (commit c2d2962), a value is that of the null prompt and that of the prompt, one behind the
other. One weight counts for both, the null prompt's values change with each prompt's, and cosines are nearer to 1: b =
0.93 there is about b = 0.86 here. Here each prompt of a batch has its own values, the null prompt among them. For three
concepts and more, the code's Gram-Schmidt does not give an orthogonal basis: `orthogonal=false` does the same.
"""

# B batch, L tokens, O width of the values, n concepts.
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from unlearning.concepts import UnlearningTask
from unlearning.config.values import Finite, Positive
from unlearning.erasures.module_edit import ModuleEdit
from unlearning.methods.base import Method
from unlearning.models.attention import text_only_attention
from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.layers import outputs_of
from unlearning.models.side_modules import SideModule


class Decomposer(SideModule):
    """-sum_m g(cos(v*_m, v)) a_m v*_m of values v (B, L, O), with a_m = <dual_m, v>.

    Args:
        target: v*, (n, O).
        dual: The projection's coefficients are products with these vectors, (n, O); for one concept
            v* / ||v*||^2.
        first: The places before it keep their values.
        shift: (p, b, s) of the shift factor; None for g = 1.
    """

    names: ClassVar[tuple[str, ...]] = ("target", "dual")

    def __init__(self, target: Tensor, dual: Tensor, first: int, shift: Sequence[float] | None):
        super().__init__()
        self.target, self.dual = nn.Buffer(target), nn.Buffer(dual)
        self.first, self.shift = first, shift

    @classmethod
    def restored(cls, layer: nn.Module, state: Mapping[str, Tensor], **options) -> Self:
        return cls(state["target"], state["dual"], **options)

    def forward(self, v: Tensor) -> Tensor:
        a = v.float() @ self.dual.T  # (B, L, n)
        if self.shift is not None:
            p, b, s = self.shift
            a = a * s * (p * (cosine_similarity(v.float()[..., None, :], self.target, dim=-1) - b)).sigmoid()
        taken = a @ self.target
        taken[:, : self.first] = 0
        return -taken


@dataclass(frozen=True)
class ValueEdit(ModuleEdit):
    """A decomposer of the outputs of the map to values in cross-attention layers."""

    kind: ClassVar[type[SideModule]] = Decomposer
    reads = "output"


class AdaVD(Method):
    """Takes the concept out of the values of cross-attention.

    Args:
        shift: Whether there is a shift factor.
        p, b, s: Parameters of the shift factor.
        orthogonal: Whether the values of several concepts are projected onto their span; false as in the released code.
    """

    writable = False

    def __init__(
        self, *, shift: bool = True, p: Positive = 100.0, b: Finite = 0.93, s: Positive = 2.0, orthogonal: bool = True
    ):
        self.shift, self.orthogonal = [p, b, s] if shift else None, orthogonal

    @torch.no_grad()
    def fit(self, model: DiffusionModel, task: UnlearningTask) -> ValueEdit:
        names = [concept.name for concept in task.erase]
        pieces, c = model.word_pieces(names), model.encode_prompts(names)
        first, last = pieces[0].start, torch.tensor([own.stop - 1 for own in pieces])
        states = c.embeds.clone()
        states[:, first:] = c.embeds[torch.arange(len(c)), last][:, None]  # at every place
        weights = {}
        for name, v in values(model, replace(c, embeds=states), first).items():
            weights[f"{name}.target"] = v.float()
            weights[f"{name}.dual"] = (dual if self.orthogonal else released_dual)(v.double()).float()
        return ValueEdit(weights, options={"first": first, "shift": self.shift})


def values(model: DiffusionModel, c: Conditioning, place: int) -> dict[str, Tensor]:
    """The values of the states at a position of the text, (n, O) by full name of the map to values."""
    maps = {f"{name}.to_v": layer.to_v for name, layer in text_only_attention(model).items()}
    x_t, t = torch.zeros(len(c), *model.latent_shape, device=model.device), model.timesteps(torch.full((len(c),), 0.5))
    with ExitStack() as stack:
        outputs = {name: stack.enter_context(outputs_of(m)) for name, m in maps.items()}
        model.predict(x_t, t, c)
    return {name: calls[-1][:, place] for name, calls in outputs.items()}


def dual(v: Tensor) -> Tensor:
    """(n, O) such that sum_m <dual_m, x> v_m is the projection of x onto the span of v (n, O)."""
    return torch.linalg.pinv(v).T


def released_dual(v: Tensor) -> Tensor:
    """The same with the released code's basis q_i = v_i - sum_{j < i} <v_j, v_i> / ||v_j||^2 v_j."""
    to_basis = torch.eye(len(v)).to(v) - torch.tril(v @ v.T / v.square().sum(1), diagonal=-1)
    q = to_basis @ v
    return to_basis.T @ (q / q.square().sum(1, keepdim=True))

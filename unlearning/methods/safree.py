"""SAFREE: Training-Free and Adaptive Guard (Yoon et al., 2024). https://arxiv.org/abs/2410.12761

Text. C spans the pooled embeddings of the concept's phrases, I those of the prompt, each with one of n tokens masked:

    P_C = C (C^T C)^+ C^T,  P_I likewise
    d_i = || (I - P_C) p_i ||,  p_i the pooled embedding without token i
    token i is a trigger if d_i >= (1 + alpha) mean_{j != i} d_j: without it the prompt is farther from the concept
    e_i <- (I - P_C) P_I e_i for triggers only.

Self-validating filter. The filtered embedding holds in the sampling steps 0 to t', the prompt's own after that:

    beta = 1 - mean_i cos(e_i, (I - P_C) P_I e_i) over all tokens but the padding
    t'   = round(up_t sigmoid(2 k (10 beta - b))),  k and b as in the released code.

Latent filter, in a UNet. Z and Z_0 are the low frequencies of a skip feature under the filtered and the own embedding:

    Z <- s Z  where Re Z > Re Z_0.

As in the released code, s is s_1 before the widest features of the up blocks and s_2 before the second widest. That
code writes the constant s wherever Re Z >= Re Z_0, also under prompts without triggers: `constant=True`. Its script for
Stable Diffusion (commit b8b2c3f) never says which of its filters it wants, and applies none: `latent=None`.

Deviations. The pooled embedding is the state after the last word piece (the end-of-text token of CLIP and T5) among the
states that the denoiser reads. In Stable Diffusion 1 and 2 it is CLIP's pooled output, as in the released code. In SDXL
it is not, and the released code filters the second text encoder alone. Here each text encoder in `Conditioning.embeds`
has its own subspaces, triggers and beta, and its states are filtered: both of SDXL, the three of SD3, T5 of Flux and of
PixArt, Gemma of Sana. t' follows the mean beta. Pooled outputs (SDXL, SD3, Flux) are not filtered, as in the released
code. Projectors are computed in float64, and no gradient flows through them.
"""

# B batch, L tokens, D text width, n word pieces of a prompt; C channels, h w height and width of a UNet's features.
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from diffusers import ModelMixin
from torch import Tensor, nn
from torch.fft import fft2, fftshift, ifft2, ifftshift
from torch.nn.functional import cosine_similarity

from unlearning.concepts import UnlearningTask
from unlearning.config.values import Finite, Natural, NonNegative
from unlearning.erasures.base import Erasure
from unlearning.erasures.composed import composed
from unlearning.erasures.guidance_edit import GuidanceEdit
from unlearning.erasures.prompt_edit import ConditioningEdit, PromptEdit
from unlearning.errors import UserError
from unlearning.methods.base import Method
from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.embeddings import Embedded, Text
from unlearning.models.guidance import Guidance, Scale, Walk
from unlearning.models.layers import eager
from unlearning.sampling.guidance import branches

FOREVER = sys.maxsize  # sampling steps


def projector(vectors: Tensor) -> Tensor:
    """P (D, D) onto the span of vectors (n, D), in float64; what differs by rounding in float32 spans nothing."""
    C = vectors.double().T
    return C @ torch.linalg.pinv(C, rtol=max(C.shape) * torch.finfo(torch.float32).eps)


@dataclass(frozen=True)
class SubspaceFilter(ConditioningEdit):
    """Projects a prompt's trigger tokens out of the concept's subspace.

    Args:
        concepts: Phrases that span C.
        alpha: By what share a trigger's distance exceeds the mean of the others.
        up_t: The largest t'; None for no self-validating filter: the filtered embedding holds in all steps.
        k, b: Slope and midpoint of t' over 10 beta.
    """

    concepts: tuple[str, ...]
    alpha: NonNegative = 0.01
    up_t: Natural | None = 10
    k: NonNegative = 2.5
    b: Finite = 5.333

    def __call__(self, model: DiffusionModel, text: Text, c: Conditioning) -> Conditioning:
        filtered = replace(c, embeds=c.embeds.clone())
        states, outside = model.text_states(filtered), self._outside(model)
        steps = [
            self._filter(model, text[i : i + 1], {name: e[i] for name, e in states.items()}, outside)
            for i in range(len(c))
        ]
        return replace(filtered, steps=torch.tensor(steps, device=c.embeds.device), later=c)

    @torch.no_grad()
    def _outside(self, model: DiffusionModel) -> dict[str, Tensor]:
        """I - P_C (D, D) of each text encoder."""
        states = model.text_states(model.encode(self.concepts, edits=()))
        P_C = {name: projector(pooled(e, _pieces(model, self.concepts, name, e))) for name, e in states.items()}
        return {name: torch.eye(len(P)).to(P) - P for name, P in P_C.items()}

    def _filter(
        self, model: DiffusionModel, text: Text, states: Mapping[str, Tensor], outside: Mapping[str, Tensor]
    ) -> int:
        """Filters one prompt's states (L, D) in place. Returns for how many sampling steps the filtered ones hold."""
        betas = []
        for name, (pieces, p) in masked_one_by_one(model, text, states).items():
            e = states[name]
            projected = (e.double() @ (outside[name] @ projector(p)).T).to(e.dtype)
            read = slice(pieces.stop + 1)  # all but the padding
            betas.append(1 - cosine_similarity(e[read].float(), projected[read].float(), dim=-1).mean().item())
            places = torch.tensor(pieces, device=e.device)[self.triggers((p.double() @ outside[name]).norm(dim=1))]
            e[places] = projected[places]
        return self.steps(sum(betas) / len(betas)) if betas else 0

    def triggers(self, d: Tensor) -> Tensor:
        """Which of n word pieces are triggers, (n,), from their d (n,). A single one is, as in the released code."""
        others = (d.sum() - d) / (len(d) - 1)
        return ~(d < (1 + self.alpha) * others)  # true for a single one, too: its `others` is NaN

    def steps(self, beta: float) -> int:
        """t' + 1: in how many sampling steps the filtered embedding holds."""
        if self.up_t is None:
            return FOREVER
        return round(self.up_t * torch.tensor(2 * self.k * (10 * beta - self.b)).sigmoid().item()) + 1


def pooled(states: Tensor, pieces: Sequence[range]) -> Tensor:
    """The state (B, D) after the last word piece of each text, of states (B, L, D)."""
    return states[torch.arange(len(states)), torch.tensor([own.stop for own in pieces])]


@torch.no_grad()
def masked_one_by_one(
    model: DiffusionModel, text: Text, states: Mapping[str, Tensor]
) -> dict[str, tuple[range, Tensor]]:
    """The places of a prompt's n word pieces, and its pooled embeddings (n, D) without each, by text encoder.

    A masked token has the token embedding of id 0, as in the released code.

    Args:
        text: One prompt.
        states: Its states (L, D) by text encoder.
    """
    prompt = text.prompts if isinstance(text, Embedded) else tuple(text)
    pieces = {name: _pieces(model, prompt, name, e)[0] for name, e in states.items()}
    pieces = {name: own for name, own in pieces.items() if own}
    if not pieces:
        return {}
    embedded, n = model.embed(text), max(map(len, pieces.values()))
    copies = {name: e.repeat(n, 1, 1) for name, e in embedded.embeds.items()}
    for name, own in pieces.items():
        table = model.text_encoders[name].get_input_embeddings()
        before = copies[name].shape[1] - len(states[name])  # tokens of an instruction, whose states are left out
        mask = table(torch.zeros((), dtype=torch.long, device=table.weight.device))
        copies[name][torch.arange(len(own)), torch.tensor(own) + before] = mask
    masked = model.text_states(model.encode(Embedded(prompt * n, copies), edits=()))
    return {name: (own, pooled(masked[name][: len(own)], [own] * len(own))) for name, own in pieces.items()}


def _pieces(model: DiffusionModel, prompts: Sequence[str], encoder: str, states: Tensor) -> list[range]:
    """The places of word pieces in states (..., L, D), of which the last is the end of the text."""
    last = states.shape[-2] - 1
    return [range(own.start, min(own.stop, last)) for own in model.word_pieces(prompts, encoder)]


@dataclass(frozen=True)
class LatentFilter(Guidance):
    """Classifier-free guidance, with the latent filter on the branch of the filtered prompt.

    Each step predicts a third branch, of the prompt's own embedding. It is what a conditioning becomes in the end: a
    conditioning without a schedule is its own, and without a change nothing is filtered.

    Args:
        s_1: s before the widest features of the up blocks.
        s_2: s before the second widest.
        constant: Whether s itself is written, and whatever the prompt, as in the released code.
    """

    s_1: NonNegative = 0.9
    s_2: NonNegative = 0.2
    constant: bool = False

    @torch.no_grad()
    def begin(self, model: DiffusionModel, c: Conditioning, scale: Scale) -> Walk:
        null, own = model.encode_prompts([""]), c.at(FOREVER)

        def guided(x_t: Tensor, t: Tensor, c: Conditioning, step: int) -> Tensor:
            rows = (c.embeds != own.embeds).flatten(1).any(1) | self.constant
            with self._filtering(model.denoiser, rows):
                eps_0, _, eps_c = branches(model, x_t, t, null, own, c)
            return eps_0 + scale * (eps_c - eps_0)

        return Walk(c, guided)

    @contextmanager
    def _filtering(self, unet: ModelMixin, rows: Tensor) -> Iterator[None]:
        """Within it the skip features of the given rows' third branch are filtered, rows (B,)."""
        widths = sorted(set(unet.config.block_out_channels), reverse=True)
        s = dict(zip(widths, (self.s_1, self.s_2), strict=False))

        def hook(width: int) -> Callable:
            def filter_skip(_, inputs: tuple) -> tuple:
                features, *rest = inputs
                main, skip = features[:, :width], features[:, width:]
                null, own, filtered = skip.chunk(3)
                changed = self.reattended(filtered, own, s[width])
                filtered = torch.where(rows[:, None, None, None], changed, filtered)
                return torch.cat([main, torch.cat([null, own, filtered])], dim=1), *rest

            return filter_skip

        with ExitStack() as stack:
            for resnet, width in joints(unet):
                if width in s:
                    stack.callback(resnet.register_forward_pre_hook(hook(width)).remove)
            yield stack.enter_context(eager())

    def reattended(self, h: Tensor, h_0: Tensor, s: float) -> Tensor:
        """The skip features h (B, C, h, w) under the filtered prompt, filtered by h_0 under the prompt's own."""
        Z, Z_0 = (fftshift(fft2(features.float()), dim=(-2, -1)) for features in (h, h_0))
        row, column = (side // 2 for side in h.shape[-2:])
        low = (..., slice(max(row - 1, 0), row + 1), slice(max(column - 1, 0), column + 1))
        if self.constant:
            Z[low] = torch.where(Z_0[low].real > Z[low].real, Z[low], s)
        else:
            Z[low] = torch.where(Z[low].real > Z_0[low].real, s * Z[low], Z[low])
        return ifft2(ifftshift(Z, dim=(-2, -1))).real.to(h.dtype)


def joints(unet: ModelMixin) -> Iterator[tuple[nn.Module, int]]:
    """The layers of the up blocks that read features with a skip feature below, and the width of the former."""
    width = unet.config.block_out_channels[-1]
    for block in unet.up_blocks:
        for resnet in block.resnets:
            yield resnet, width
            width = resnet.out_channels


class SAFREE(Method):
    """Filters the prompt, and the UNet's features, while images are generated.

    Args:
        concepts: Phrases that span the concept's subspace; None for the names of the erased concepts.
        alpha, up_t, k, b: As in SubspaceFilter.
        latent: The latent filter; None for the text alone.
    """

    writable = False

    def __init__(
        self,
        *,
        concepts: Sequence[str] | None = None,
        alpha: NonNegative = 0.01,
        up_t: Natural | None = 10,
        k: NonNegative = 2.5,
        b: Finite = 5.333,
        latent: LatentFilter | None = None,
    ):
        self.concepts, self.settings, self.latent = concepts, (alpha, up_t, k, b), latent

    def fit(self, model: DiffusionModel, task: UnlearningTask) -> Erasure:
        if not model.text_encoders:
            raise UserError(f"{model.name} reads no text, which SAFREE filters. Choose another method.")
        concepts = tuple(self.concepts or (concept.name for concept in task.erase))
        text = PromptEdit(SubspaceFilter(concepts, *self.settings))
        if self.latent is None:
            return text
        if not hasattr(model.denoiser, "up_blocks"):
            raise UserError(f"{model.name} has no UNet for SAFREE's latent filter: method=safree_text goes without.")
        return composed(text, GuidanceEdit(self.latent))

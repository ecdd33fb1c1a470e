"""Attention to the text: its layers, and maps of where in the image each token of the text is attended to.

By a UNet's cross-attention, or by joint attention.
"""

# B batch, N heads, P places of the image, L tokens of the text, D width, d width of a head, S a square image's side.
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from unlearning.errors import UserError
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.layers import eager

MASK_SIDE = 16  # side of the attention maps for a mask


def text_only_attention(model: DiffusionModel) -> dict[str, Attention]:
    """Every layer in which an image attends to the text alone, by full name: of UNets, PixArt and Sana.

    Raises:
        UserError: If the denoiser has none.
    """
    layers = {n: m for n, m in model.named_modules().items() if n.startswith(model.component) and n.endswith(".attn2")}
    if not layers:
        raise UserError(
            f"{model.name} has no cross-attention: a transformer attends to image and text jointly, or reads no text. "
            "Choose a model with a UNet, PixArt or Sana, or another method."
        )
    return layers


def cross_attention(model: DiffusionModel) -> dict[str, Attention]:
    """Every layer in which a UNet's image attends to the text, by full name ("unet.….attn2").

    Raises:
        UserError: If the denoiser is not a UNet with cross-attention.
    """
    layers = {n: m for n, m in model.named_modules().items() if n.startswith("unet.") and n.endswith(".attn2")}
    if not layers:
        raise UserError(
            f"{model.name} has no UNet with cross-attention: a transformer attends to image and text jointly. Choose "
            "model=sd14, sd15, sd21, sdxl or emoji_unet, or another method."
        )
    return layers


def text_attention(model: DiffusionModel) -> dict[str, nn.Module]:
    """Every layer in which the image attends to the text, by full name: cross-attention of a UNet, or joint attention.

    Raises:
        UserError: If the denoiser has neither.
    """
    layers = {n: m for n, m in model.named_modules().items() if n.startswith(model.component)}
    joint = {n: m for n, m in layers.items() if getattr(m, "add_k_proj", None) is not None}
    if not joint and model.component == "transformer":
        raise UserError(
            f"{model.name} has neither a UNet's cross-attention nor joint attention. Choose model=sd14, sd15, sd21, "
            "sdxl, sd3, flux or an embedded one, or another method."
        )
    return joint or dict(cross_attention(model))


def concept_places(model: DiffusionModel, prompts: Sequence[str], words: Sequence[str], end: bool = False) -> Tensor:
    """The positions of the word pieces of each prompt's word or words in the text states, (B, L) bool.

    Args:
        prompts: B texts.
        words: What each of them names; of several occurrences the last one counts.
        end: Whether the end of the text is taken too.

    Raises:
        UserError: If a prompt does not contain its words.
    """
    c = model.encode_prompts(prompts)
    numbers = torch.arange(c.embeds.shape[1], device=c.embeds.device)[None, :, None].expand_as(c.embeds)
    places = torch.zeros(c.embeds.shape[:2], dtype=torch.bool, device=c.embeds.device)
    for encoder, own in model.text_states(replace(c, embeds=numbers)).items():
        pieces, wanted = model.token_ids(prompts, encoder), model.token_ids(words, encoder)
        ranges = model.word_pieces(prompts, encoder)
        for row, (all_, some, at) in enumerate(zip(pieces, wanted, ranges, strict=True)):
            starts = [i for i in range(len(all_) - len(some) + 1) if all_[i : i + len(some)] == some]
            if not some or not starts:
                raise UserError(f"{prompts[row]!r} does not contain the word pieces of {words[row]!r}.")
            first = at.start + starts[-1]
            places[row, own[row, first : first + len(some), 0]] = True
            if end and at.stop < own.shape[1]:  # a text may leave no place for it
                places[row, own[row, at.stop, 0]] = True
    return places


@contextmanager
def cross_attention_maps(model: DiffusionModel) -> Iterator[dict[str, list[Tensor]]]:
    """Records the attention probabilities of every cross-attention layer within the context.

    Yields a dictionary that is filled by calls of the model: by full name of the layer, (B, N, P, L) for each call;
    the sum over L is 1, and the P places are the rows of the image one after the other. The maps are computed again
    from the layer's inputs, so that the model's own attention, whatever its implementation, and its predictions stay
    as they are. They are differentiable, but not under gradient checkpointing.

    Raises:
        UserError: If the denoiser is not a UNet with cross-attention.
    """
    with _recorded(cross_attention(model)) as maps:
        yield maps


@contextmanager
def text_attention_maps(model: DiffusionModel) -> Iterator[dict[str, list[Tensor]]]:
    """As `cross_attention_maps`, of every layer of `text_attention`.

    In joint attention the image attends to itself too: the sum over L is what it attends to the text.
    """
    with _recorded(text_attention(model)) as maps:
        yield maps


@contextmanager
def _recorded(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    maps: dict[str, list[Tensor]] = defaultdict(list)

    def keep(name: str):
        def hook(layer: nn.Module, arguments: tuple, keywords: dict, _) -> None:
            joint = getattr(layer, "add_k_proj", None) is not None
            maps[name].append((_joint if joint else _probabilities)(layer, *arguments, **keywords))

        return hook

    with ExitStack() as stack, eager():
        for name, layer in layers.items():
            stack.callback(layer.register_forward_hook(keep(name), with_kwargs=True).remove)
        yield maps


def _joint(
    layer: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, image_rotary_emb: Any = None, **_
) -> Tensor:
    """The text's columns, (B, N, P, L), of softmax(Q [K_text, K_image]^T / sqrt(d)) for the places of the image."""

    def heads(states: Tensor, norm: nn.Module | None) -> Tensor:
        states = states.unflatten(-1, (layer.heads, -1))
        return states if norm is None else norm(states)

    L = encoder_hidden_states.shape[1]
    Q = heads(layer.to_q(hidden_states), layer.norm_q)
    K = torch.cat([
        heads(layer.add_k_proj(encoder_hidden_states), layer.norm_added_k),
        heads(layer.to_k(hidden_states), layer.norm_k),
    ], dim=1)  # fmt: skip
    if image_rotary_emb is not None:  # of the text's places, and then the image's
        cos, sin = image_rotary_emb
        Q = apply_rotary_emb(Q, (cos[L:], sin[L:]), sequence_dim=1)
        K = apply_rotary_emb(K, image_rotary_emb, sequence_dim=1)
    scores = torch.einsum("bpnd,bknd->bnpk", Q, K) * Q.shape[-1] ** -0.5
    return scores.softmax(-1)[..., :L]


def _probabilities(
    layer: Attention, x: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None, **_
) -> Tensor:
    """softmax(Q K^T / sqrt(d)) (B, N, P, L), of places x (B, P, D) and text states (B, L, D)."""
    batch, tokens = encoder_hidden_states.shape[:2]
    mask = layer.prepare_attention_mask(attention_mask, tokens, batch)
    query, key = (layer.head_to_batch_dim(m) for m in (layer.to_q(x), layer.to_k(encoder_hidden_states)))
    return layer.get_attention_scores(query, key, mask).unflatten(0, (batch, -1))


def concept_mask(maps: Mapping[str, Tensor], words: Sequence[range], threshold: float) -> Tensor:
    """M (B, 1, S, S) of zeros and ones: where the concept is attended to.

    Args:
        maps: Attention probabilities of each layer, (B, N, P, L), of square images.
        words: The positions of the concept's word pieces in each row.
        threshold: Threshold of the map, which is scaled to [0, 1].
    """
    sides = {name: math.isqrt(m.shape[2]) for name, m in maps.items()}
    S = min(sides.values(), key=lambda side: abs(math.log(side / MASK_SIDE)))
    mean = torch.stack([m.float().mean(1) for name, m in maps.items() if sides[name] == S]).mean(0)  # (B, P, L)
    places = torch.stack([row[:, own.start : own.stop].mean(-1) for row, own in zip(mean, words, strict=True)])
    low, high = places.amin(1, keepdim=True), places.amax(1, keepdim=True)
    return ((places - low) >= threshold * (high - low)).float().unflatten(1, (1, S, S))


def attended(A: Tensor, M: Tensor, words: Tensor) -> Tensor:
    """|| A[M, words] ||_F (B,) of probabilities A (B, N, P, L), M (B, 1, S, S) and words (B, L) of zeros and ones."""
    side = math.isqrt(A.shape[2])
    places = F.interpolate(M, (side, side)).flatten(1)  # (B, P)
    chosen = A.float() * places[:, None, :, None] * words[:, None, None, :]
    return chosen.square().sum((1, 2, 3)).clamp(min=torch.finfo(torch.float32).tiny).sqrt()

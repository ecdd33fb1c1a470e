"""Cross-attention to the text: its layers, and maps of where in the image a UNet attends to each token of the text."""

# B batch, N heads, P places of the image, L tokens of the text, D width, S a square image's side.
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from torch import Tensor

from unlearning.errors import UserError
from unlearning.models.diffusion import DiffusionModel, eager

MASK_SIDE = 16  # of the attention maps that a mask is made of


def text_attention(model: DiffusionModel) -> dict[str, Attention]:
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


@contextmanager
def cross_attention_maps(model: DiffusionModel) -> Iterator[dict[str, list[Tensor]]]:
    """Records the attention probabilities of every cross-attention layer within the context.

    Yields a dictionary that is filled by calls of the model: by full name of the layer, (B, N, P, L) for each call;
    the sum over L is 1, and the P places are the rows of the image one after the other. The maps are worked out again
    from the layer's inputs, so that the model's own attention, whatever its implementation, and its predictions stay
    as they are. They are differentiable, but not under gradient checkpointing.

    Raises:
        UserError: If the denoiser is not a UNet with cross-attention.
    """
    maps: dict[str, list[Tensor]] = defaultdict(list)

    def keep(name: str):
        def hook(layer: Attention, arguments: tuple, keywords: dict, _) -> None:
            maps[name].append(_probabilities(layer, *arguments, **keywords))

        return hook

    with ExitStack() as stack, eager():
        for name, layer in cross_attention(model).items():
            stack.callback(layer.register_forward_hook(keep(name), with_kwargs=True).remove)
        yield maps


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
        threshold: Of the map scaled to [0, 1].
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

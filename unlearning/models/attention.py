"""The cross-attention of a UNet: its layers, and maps of where in the image each token of the text is attended to."""

# B batch, N heads, P places of the image, L tokens of the text, D width.
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from diffusers.models.attention_processor import Attention
from torch import Tensor

from unlearning.errors import UserError
from unlearning.models.diffusion import DiffusionModel, eager


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

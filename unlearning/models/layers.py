"""The outputs of a network's layers, and an image's features in them."""

# B batch, D feature width, h w feature grid.
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from unlearning.errors import UserError


@contextmanager
def outputs_of(module: nn.Module) -> Iterator[list]:
    """The outputs of a layer's calls within the context. Compiled modules run eagerly in it, so that hooks fire."""
    outputs: list = []
    hook = module.register_forward_hook(lambda _, __, output: outputs.append(output))
    try:
        with eager():
            yield outputs
    finally:
        hook.remove()


def eager() -> AbstractContextManager:
    """A context in which compiled modules run eagerly, so that forward hooks fire on them."""
    return torch.compiler.set_stance("force_eager")


def on_grid(output: Tensor | tuple, height: int, width: int, text: int, layer: str) -> Tensor:
    """A layer's output as (B, D, h, w): a UNet's at its own scale, a transformer's image tokens.

    Blocks of joint attention return text tokens and then image tokens, as two tensors or as one sequence.
    """
    parts = [p for p in (output if isinstance(output, tuple) else (output,)) if torch.is_tensor(p)]
    places = height * width
    for part in reversed(parts):
        if part.ndim == 4 and _scaled_down(part.shape[-2], part.shape[-1], height, width):
            return part
        if part.ndim == 3 and part.shape[1] in (places, text + places):
            return part[:, -places:].transpose(1, 2).unflatten(2, (height, width))
    shapes = " and ".join(str(tuple(p.shape)) for p in parts) or "nothing"
    raise UserError(f"Layer {layer!r} returns {shapes}, which is not a {height} by {width} grid.")


def _scaled_down(h: int, w: int, height: int, width: int) -> bool:
    """Whether an h by w grid is the height by width grid at the same or a smaller scale. Attention heads are not."""
    return h <= height and w <= width and round(height / h) == round(width / w)

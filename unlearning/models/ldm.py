"""Names and adapters of the `ldm` code base, in which Stable Diffusion 1 was published."""

import re
from pathlib import Path

import torch
from torch import Tensor

from unlearning.errors import UserError

PER_LEVEL = (
    3  # positions that a level of input_blocks and of output_blocks has: two layers and a sampler, or three layers
)


def diffusers_name(name: str) -> str:
    """A module of ldm's UNet in diffusers' words; raises ValueError for one that has none.

    "input_blocks.4.1.transformer_blocks.0.attn2.to_k" is "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k".
    """
    name = re.sub(r"^(model\.)?diffusion_model\.", "", name).replace("emb_layers.1", "time_emb_proj")
    if match := re.fullmatch(r"time_embed\.([02])", name):
        return f"time_embedding.linear_{1 + int(match[1]) // 2}"
    if match := re.fullmatch(r"middle_block\.([012])\.(.+)", name):
        place = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}[match[1]]
        return f"mid_block.{place}.{match[2]}"
    if match := re.fullmatch(r"(input|output)_blocks\.(\d+)\.([01])\.(.+)", name):
        side, number, part, rest = match.groups()
        level, layer = divmod(int(number) - (side == "input"), PER_LEVEL)
        kind = "attentions" if part == "1" else "resnets"
        return f"{'down' if side == 'input' else 'up'}_blocks.{level}.{kind}.{layer}.{rest}"
    raise ValueError(f"{name} is no layer of ldm's UNet that an adapter could be on")


def read_adapter(path: str | Path, alpha: float) -> dict[str, Tensor]:
    """UnGuide's `lora.pth` (W + alpha (A B)^T, A (in, r), B (r, out)) under the names of `erasure.Adapter`.

    Only tensors are read (`weights_only`). Raises UserError for a file that is something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        weights = {}
        for key, value in state.items():
            module, _, which = key.rpartition(".lora.")
            if which not in ("A", "B"):
                raise ValueError(f"it has {key!r}, which ends neither in .lora.A nor in .lora.B")
            scale = alpha if which == "B" else 1.0
            name = f"unet.{diffusers_name(module)}.lora_{which}.weight"
            weights[name] = (scale * value.float()).T.contiguous()
        return weights
    except Exception as error:  # unpickling a foreign file can fail in any way
        raise UserError(f"{path} is not an adapter as UnGuide's repository saves it: {error}") from error

"""Checkpoints, layer names and adapters of the `ldm` code base, in which Stable Diffusion 1 was published."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from torch import Tensor

from unlearning.errors import UserError

PER_LEVEL = 3  # blocks of a level: two layers and a sampler in input_blocks, three layers in output_blocks
UNET, VAE = "model.diffusion_model.", "first_stage_model."
BEFORE, FIRST = (UNET, "diffusion_model.", ""), "input_blocks.0.0.weight"  # how the names of a whole UNet begin


def is_whole(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict holds all of ldm's UNet, with or without the rest of a checkpoint."""
    return any(before + FIRST in state for before in BEFORE)


def converted(state: Mapping[str, Tensor], unet: UNet2DConditionModel, vae: AutoencoderKL) -> dict[str, Tensor]:
    """The weights of a whole UNet or checkpoint by diffusers' names, from its own converters.

    The constants of the noise schedule and the weights' moving average are left out; the text encoder's names stay.

    Args:
        state: See `is_whole`.
        unet, vae: Networks with the same architecture.

    Raises:
        ValueError: If diffusers has no name for some of the weights.
    """
    before = next(before for before in BEFORE if before + FIRST in state)
    named = {UNET + n.removeprefix(before) if n.startswith(before) else n: v for n, v in state.items()}
    named = {n: v for n, v in named.items() if "." in n and not n.startswith("model_ema.")}
    parts = (("unet", UNET, convert_ldm_unet_checkpoint, unet), ("vae", VAE, convert_ldm_vae_checkpoint, vae))
    by_name = {name: value for name, value in named.items() if not name.startswith((UNET, VAE))}
    for part, prefix, convert, network in parts:
        given = {name: value for name, value in named.items() if name.startswith(prefix)}
        try:
            weights = convert(dict(given), network.config) if given else {}
        except KeyError as error:
            raise ValueError(f"its {part} has no {error}") from error
        if len(weights) != len(given):
            raise ValueError(f"of {len(given)} weights of its {part}, diffusers knows {len(weights)}")
        by_name |= {f"{part}.{name}": value for name, value in weights.items()}
    return by_name


def diffusers_name(name: str) -> str:
    """diffusers' name of a module of ldm's UNet.

    "input_blocks.4.1.transformer_blocks.0.attn2.to_k" is "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k".

    Raises:
        ValueError: If the module has no counterpart in diffusers.
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
    raise ValueError(f"{name} is not a layer of ldm's UNet that can have an adapter")


def read_adapter(path: str | Path, alpha: float) -> dict[str, Tensor]:
    """The adapter in a `lora.pth` of UnGuide's repository, by the names of erasures/module_edit.py.

    The file holds A (in, r) and B (r, out) with W + alpha (A B)^T. Only tensors are read (`weights_only`).

    Raises:
        UserError: If the file holds something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        weights = {}
        for key, value in state.items():
            module, _, which = key.rpartition(".lora.")
            if which not in ("A", "B"):
                raise ValueError(f"the key {key!r} does not end in .lora.A or .lora.B")
            scale = alpha if which == "B" else 1.0
            name = f"unet.{diffusers_name(module)}.lora_{which}.weight"
            weights[name] = (scale * value.float()).T.contiguous()
        return weights
    except Exception as error:  # unpickling a foreign file can fail in any way
        raise UserError(f"{path} is not an adapter as UnGuide's repository saves it: {error}") from error

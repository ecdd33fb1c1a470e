"""Converts checkpoints of the `taming-transformers` code base (Esser et al., CVPR 2021) to diffusers' VQModel.

Both have the same layers with different names: taming's `down.2.attn.1` is diffusers' attention after the same resnet
of a block, and taming counts the decoder's levels from the finest. Only the choice of a code differs: VQModel takes the
nearest vector of the codebook, GumbelVQ the argmax of 8192 logits.
"""

import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from diffusers import VQModel
from torch import Tensor, nn

from unlearning.errors import UserError

SOURCE = (
    "The README of https://github.com/CompVis/taming-transformers lists vqgan_gumbel_f8 (OpenImages, 8192 codes); "
    "download its last.ckpt."
)
GROUPS, RESOLUTION = 32, 256  # of taming's norms and training images; tensor shapes do not show them

NAMES = (  # patterns of diffusers' names, and taming's names for them
    (r"\.mid_block\.resnets\.0\.", ".mid.block_1."),
    (r"\.mid_block\.resnets\.1\.", ".mid.block_2."),
    (r"\.mid_block\.attentions\.0\.", ".mid.attn_1."),
    (r"\.down_blocks\.(\d+)\.", r".down.\1."),
    (r"\.resnets\.", ".block."),
    (r"\.attentions\.", ".attn."),
    (r"\.(down|up)samplers\.0\.", r".\1sample."),
    (r"\.conv_shortcut\.", ".nin_shortcut."),
    (r"\.conv_norm_out\.", ".norm_out."),
    (r"\.group_norm\.", ".norm."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".proj_out."),
)


def taming_name(name: str, levels: int) -> str:
    """taming's name of a parameter of diffusers' VQModel.

    With four levels, "decoder.up_blocks.0.attentions.2.to_q.weight" is "decoder.up.3.attn.2.q.weight".
    """
    name = re.sub(r"\.up_blocks\.(\d+)\.", lambda match: f".up.{levels - 1 - int(match[1])}.", name)
    for pattern, replacement in NAMES:
        name = re.sub(pattern, replacement, name)
    return name


def convert(state: Mapping[str, Tensor]) -> tuple[VQModel, nn.Conv2d | None]:
    """Converts the state dict of taming's VQModel or GumbelVQ to diffusers' VQModel, float32, in evaluation mode.

    Sizes are inferred from the tensors. Weights that only training needs (`loss.*`) are ignored.

    Returns:
        The model; and for a GumbelVQ the map from the latents (B, C, H, W) that `encode` gives to logits (B, codes, H,
        W), whose argmax is the code (taming samples it, in evaluation too). None for a VQModel, whose code is the
        nearest vector of `model.quantize`.

    Raises:
        ValueError: For the state dict of another architecture. It names the first missing or unexpected key.
    """
    state = {key: value for key, value in state.items() if not key.startswith("loss.")}

    def shape(key: str) -> torch.Size:
        if key not in state:
            raise ValueError(f"there is no {key!r}")
        return state[key].shape

    def count(pattern: str) -> int:
        """The length of a module list, at least 1, so that its absence is an error later."""
        i = 1
        while pattern.format(i) in state:
            i += 1
        return i

    levels = count("encoder.down.{}.block.0.conv1.weight")
    logits = None
    if gumbel := "quantize.proj.weight" in state:
        codes, width, *_ = shape("quantize.proj.weight")
        logits = nn.Conv2d(width, codes, 1, device="meta")
    codes, width = shape(codebook := f"quantize.{'embed' if gumbel else 'embedding'}.weight")
    attention = [f"encoder.down.{i}.attn.0.q.weight" in state for i in range(levels)]
    with torch.device("meta"):
        model = VQModel(
            in_channels=shape("encoder.conv_in.weight")[1],
            out_channels=shape("decoder.conv_out.weight")[0],
            block_out_channels=[shape(f"encoder.down.{i}.block.0.conv1.weight")[0] for i in range(levels)],
            down_block_types=["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attention],
            up_block_types=["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attention)],
            layers_per_block=count("encoder.down.0.block.{}.conv1.weight"),
            latent_channels=shape("encoder.conv_out.weight")[0],
            num_vq_embeddings=codes,
            vq_embed_dim=width,
            sample_size=RESOLUTION,
            norm_num_groups=GROUPS,
        )

    keys = {name: taming_name(name, levels) for name in model.state_dict()} | {"quantize.embedding.weight": codebook}
    parts = [(model, keys)]
    if logits is not None:
        parts.append((logits, {name: f"quantize.proj.{name}" for name in logits.state_dict()}))
    expected = [key for _, keys in parts for key in keys.values()]
    for key in expected:
        shape(key)
    if unexpected := sorted(set(state) - set(expected)):
        raise ValueError(f"{unexpected[0]!r} does not belong to a {'GumbelVQ' if gumbel else 'VQModel'} of these sizes")

    def tensor(key: str, wanted: torch.Size) -> Tensor:
        value = state[key]
        if wanted not in (
            value.shape,
            value.squeeze().shape,
        ):  # attention has 1 × 1 convolutions in taming, linear maps in diffusers
            raise ValueError(f"{key!r} is {tuple(value.shape)} where {tuple(wanted)} is needed")
        return value.float().reshape(wanted)

    for module, keys in parts:
        module.load_state_dict({n: tensor(keys[n], p.shape) for n, p in module.state_dict().items()}, assign=True)
        module.eval().requires_grad_(False)
    return model, logits


def load(path: str | Path) -> tuple[VQModel, nn.Conv2d | None]:
    """Converts a checkpoint file: Lightning's .ckpt, a .pth with a state dict, or .safetensors. Only tensors are read.

    Raises:
        UserError: If the file is missing, damaged, of another architecture, or holds other objects than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"There is no checkpoint at {path}. {SOURCE}")
    try:
        return convert(_read(path))
    except ValueError as error:
        raise UserError(f"{path} is not a VQ-GAN of taming-transformers: {error}. {SOURCE}") from error


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged or foreign file can fail in any way
        if isinstance(error, pickle.UnpicklingError) and "Unsupported global" in str(error):
            stripped = path.with_suffix(".pth")
            keep = f"torch.load('{path}', map_location='cpu', weights_only=False)['state_dict'], '{stripped}'"
            raise UserError(
                f"{path} holds Python objects besides its tensors, and loading them could run any code. If you trust "
                f'its source, extract the tensors: python -c "import torch; torch.save({keep})", and use {stripped} '
                "instead."
            ) from error
        raise ValueError(f"it cannot be read ({str(error).strip() or type(error).__name__})") from error
    state = state.get("state_dict", state) if isinstance(state, Mapping) else state
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError("it holds no state dict")
    return state

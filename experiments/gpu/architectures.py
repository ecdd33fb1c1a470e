"""The published architectures with random weights, from their configurations, wrapped as this package's models.

Two things are stand-ins: the tokenizers are those of the embedded models, with the published lengths, and T5-XXL is one
thin layer of its width (its 4.7 G weights encode a prompt once, and no row of the table trains it).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    VQModel,
)
from torch import nn
from transformers import (
    AutoTokenizer,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    T5Config,
    T5EncoderModel,
)

from unlearning.models.diffusion import DiffusionModel
from unlearning.models.flux import Flux
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.models.stable_diffusion_3 import StableDiffusion3
from unlearning.models.stable_diffusion_xl import StableDiffusionXL
from unlearning.models.vqgan import VQGAN

EMBEDDED = Path(__file__).parents[2] / "unlearning" / "weights"
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
         "set_alpha_to_one": False, "steps_offset": 1}  # fmt: skip


def _tokens(folder: str, length: int):
    return AutoTokenizer.from_pretrained(EMBEDDED / folder, model_max_length=length)


def _clip(tokens, **config) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=49408, bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id, **config,
    )  # fmt: skip


def _clip_l(tokens) -> CLIPTextConfig:
    return _clip(tokens, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
                 projection_dim=768)  # fmt: skip


def _clip_g(tokens) -> CLIPTextConfig:
    return _clip(tokens, hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
                 projection_dim=1280, hidden_act="gelu")  # fmt: skip


def _thin_t5(tokens) -> T5EncoderModel:
    return T5EncoderModel(T5Config(vocab_size=len(tokens), d_model=4096, d_kv=64, d_ff=64, num_layers=1, num_heads=1))


def _autoencoder(channels: int, side: int, **config) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=channels, sample_size=side,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, **config,
    )  # fmt: skip


def unet_sd14(side: int = 64) -> UNet2DConditionModel:
    return UNet2DConditionModel(sample_size=side, cross_attention_dim=768)


def unet_sdxl(middle: int = 2, last: int = 10) -> UNet2DConditionModel:
    """With so many transformer blocks in each layer of the middle resolution and of the last one."""
    return UNet2DConditionModel(
        sample_size=128, block_out_channels=(320, 640, 1280), attention_head_dim=(5, 10, 20), cross_attention_dim=2048,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, middle, last), use_linear_projection=True, addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip


def transformer_sd3(blocks: int = 24) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=blocks, attention_head_dim=64,
        num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
        pos_embed_max_size=192,
    )  # fmt: skip


def transformer_flux(double: int = 19, single: int = 38) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=64, num_layers=double, num_single_layers=single, attention_head_dim=128, num_attention_heads=24,
        joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True, axes_dims_rope=(16, 56, 56),
    )  # fmt: skip


def sd14(side: int = 64) -> StableDiffusionPipeline:
    tokens = _tokens("emoji_unet/tokenizer", 77)
    return StableDiffusionPipeline(
        unet=unet_sd14(side), vae=_autoencoder(4, 512), text_encoder=CLIPTextModel(_clip_l(tokens)), tokenizer=tokens,
        scheduler=DDIMScheduler(**NOISE), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def sdxl(**depth: int) -> StableDiffusionXLPipeline:
    first, second = (_tokens("emoji_unet/tokenizer", 77) for _ in range(2))
    return StableDiffusionXLPipeline(
        unet=unet_sdxl(**depth), vae=_autoencoder(4, 1024, scaling_factor=0.13025), scheduler=DDIMScheduler(**NOISE),
        text_encoder=CLIPTextModel(_clip_l(first)), text_encoder_2=CLIPTextModelWithProjection(_clip_g(second)),
        tokenizer=first, tokenizer_2=second, add_watermarker=False,
    )  # fmt: skip


def sd3(**depth: int) -> StableDiffusion3Pipeline:
    first, second = (_tokens("emoji_unet/tokenizer", 77) for _ in range(2))
    third = _tokens("emoji_sd3/tokenizer_3", 256)
    vae = _autoencoder(16, 1024, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
                       use_post_quant_conv=False)  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer_sd3(**depth), vae=vae, scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=CLIPTextModelWithProjection(_clip_l(first)),
        text_encoder_2=CLIPTextModelWithProjection(_clip_g(second)), text_encoder_3=_thin_t5(third),
        tokenizer=first, tokenizer_2=second, tokenizer_3=third,
    )  # fmt: skip


def flux(**depth: int) -> FluxPipeline:
    first, second = _tokens("emoji_unet/tokenizer", 77), _tokens("emoji_sd3/tokenizer_3", 512)
    vae = _autoencoder(16, 1024, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False,
                       use_post_quant_conv=False)  # fmt: skip
    return FluxPipeline(
        transformer=transformer_flux(**depth), vae=vae, text_encoder=CLIPTextModel(_clip_l(first)), tokenizer=first,
        text_encoder_2=_thin_t5(second), tokenizer_2=second,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )  # fmt: skip


FAMILIES: dict[str, tuple[type[StableDiffusion], Callable[..., DiffusionPipeline]]] = {
    "SD1.4": (StableDiffusion, sd14),
    "SDXL": (StableDiffusionXL, sdxl),
    "SD3-medium": (StableDiffusion3, sd3),
    "FLUX.1-dev": (Flux, flux),
}


def diffusion(name: str, *, device: str, dtype: torch.dtype = torch.float32, **size) -> DiffusionModel:
    """A diffusion model of an architecture of FAMILIES; `size` is its side, or its numbers of blocks."""
    family, make = FAMILIES[name]
    with random_weights(device, dtype):
        pipe = make(**size)
    pipe.to(device, dtype).set_progress_bar_config(disable=True)
    return family(pipe, name=f"{name}'s size", fingerprint="random", device=torch.device(device))


def gumbel_f8(*, device: str) -> VQGAN:
    """taming-transformers' GumbelVQ f8: 256×256 images as 32×32 codes of 8,192."""
    with random_weights(device):
        vq = VQModel(
            block_out_channels=(128, 128, 256, 512), layers_per_block=2, latent_channels=256, vq_embed_dim=256,
            num_vq_embeddings=8192, sample_size=256,
            down_block_types=["DownEncoderBlock2D"] * 3 + ["AttnDownEncoderBlock2D"],
            up_block_types=["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 3,
        )  # fmt: skip
        logits = nn.Conv2d(256, 8192, 1)
    return VQGAN(vq, logits=logits, name="GumbelVQ f8's size", fingerprint="random", device=torch.device(device))


@contextmanager
def random_weights(device: str, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Within it, new layers have the same random weights at every call, on the device and in the dtype."""
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)

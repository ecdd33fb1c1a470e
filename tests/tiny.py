"""Tiny random pipelines of every family, built from code and saved to disk: what a user's own model looks like."""

from functools import partial
from pathlib import Path
from string import ascii_lowercase

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
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from unlearning.models.flux import Flux
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.models.stable_diffusion_3 import StableDiffusion3
from unlearning.models.stable_diffusion_xl import StableDiffusionXL

WIDTH, SIDE = 16, 16
FAMILIES = {
    "sd1": StableDiffusion,
    "sd2": StableDiffusion,
    "sdxl": StableDiffusionXL,
    "sd3": StableDiffusion3,
    "flux": Flux,
}


def tokenizer() -> CLIPTokenizer:
    pieces = [*ascii_lowercase, *(f"{c}</w>" for c in ascii_lowercase), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], model_max_length=32)


def text_config(tokens: CLIPTokenizer) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=32, bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id, projection_dim=WIDTH,
    )  # fmt: skip


def denoiser(text_width: int, **more) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width, attention_head_dim=2, norm_num_groups=4, **more,
    )  # fmt: skip


def autoencoder(**more) -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, sample_size=16,
        **more,
    )  # fmt: skip


def scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, prediction_type=prediction_type,
    )  # fmt: skip


def t5() -> tuple[T5EncoderModel, T5Tokenizer]:
    pieces = T5Tokenizer(vocab=[*((p, 0.0) for p in ("<pad>", "</s>", "<unk>", "▁", *ascii_lowercase))], extra_ids=0)
    config = T5Config(vocab_size=len(pieces), d_model=2 * WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5EncoderModel(config), pieces


def sd1(prediction_type: str = "epsilon") -> StableDiffusionPipeline:
    tokens = tokenizer()
    return StableDiffusionPipeline(
        vae=autoencoder(), text_encoder=CLIPTextModel(text_config(tokens)), tokenizer=tokens, unet=denoiser(WIDTH),
        scheduler=scheduler(prediction_type), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip


def sdxl() -> StableDiffusionXLPipeline:
    tokens = tokenizer()
    text = text_config(tokens)
    second = CLIPTextModelWithProjection(text)
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4,
             "projection_class_embeddings_input_dim": WIDTH + 6 * 4}  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=autoencoder(), text_encoder=CLIPTextModel(text), text_encoder_2=second, tokenizer=tokens,
        tokenizer_2=tokenizer(), unet=denoiser(2 * WIDTH, **added), scheduler=scheduler(), add_watermarker=False,
    )  # fmt: skip


def sd3() -> StableDiffusion3Pipeline:
    tokens = tokenizer()
    text = text_config(tokens)
    text_encoder_3, tokenizer_3 = t5()
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=2 * WIDTH, caption_projection_dim=16,
        pooled_projection_dim=2 * WIDTH, pos_embed_max_size=8,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        vae=autoencoder(scaling_factor=1.5, shift_factor=0.1), transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), tokenizer=tokens, tokenizer_2=tokenizer(),
        text_encoder=CLIPTextModelWithProjection(text), text_encoder_2=CLIPTextModelWithProjection(text),
        text_encoder_3=text_encoder_3, tokenizer_3=tokenizer_3,
    )  # fmt: skip


def flux() -> FluxPipeline:
    tokens = tokenizer()
    text_encoder_2, tokenizer_2 = t5()
    transformer = FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=2 * WIDTH, pooled_projection_dim=WIDTH, guidance_embeds=True, axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    return FluxPipeline(
        vae=autoencoder(scaling_factor=0.4, shift_factor=0.1), transformer=transformer, tokenizer=tokens,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        text_encoder=CLIPTextModel(text_config(tokens)), text_encoder_2=text_encoder_2, tokenizer_2=tokenizer_2,
    )  # fmt: skip


BUILD = {"sd1": sd1, "sd2": partial(sd1, "v_prediction"), "sdxl": sdxl, "sd3": sd3, "flux": flux}


def pipeline(family: str, seed: int = 0) -> DiffusionPipeline:
    torch.manual_seed(seed)
    return BUILD[family]()


def save(family: str, root: Path) -> Path:
    folder = root / family
    pipeline(family).save_pretrained(folder)
    return folder


# What the call of a family's own pipeline needs, besides prompts and noise, to draw what a Sampler draws.
NEEDS = {
    "flux": lambda scale: {"negative_prompt": "", "true_cfg_scale": scale, "guidance_scale": Flux.embedded_guidance},
}


def drawn_by_diffusers(
    family: str, pipeline: DiffusionPipeline, prompts: list[str], seeds: list[int], steps: int, scale: float
) -> torch.Tensor:
    """Pictures (B, 3, SIDE, SIDE) in [0, 1]."""
    said = {"prompt": prompts, "guidance_scale": scale, "height": SIDE, "width": SIDE}
    said |= NEEDS[family](scale) if family in NEEDS else {}
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return pipeline(**said, num_inference_steps=steps, generator=generators, output_type="pt").images

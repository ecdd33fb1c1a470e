"""Tiny random pipelines of every family, built from code and saved to disk: what a user's own model looks like."""

from pathlib import Path
from string import ascii_lowercase

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
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

from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.models.stable_diffusion_3 import StableDiffusion3
from unlearning.models.stable_diffusion_xl import StableDiffusionXL

WIDTH = 16
FAMILIES = {"sd1": StableDiffusion, "sd2": StableDiffusion, "sdxl": StableDiffusionXL, "sd3": StableDiffusion3}


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


def pipeline(family: str, seed: int = 0) -> DiffusionPipeline:
    torch.manual_seed(seed)
    tokens = tokenizer()
    text = text_config(tokens)
    if family == "sd3":
        pieces = T5Tokenizer(
            vocab=[*((p, 0.0) for p in ("<pad>", "</s>", "<unk>", "▁", *ascii_lowercase))], extra_ids=0
        )
        t5 = T5Config(vocab_size=len(pieces), d_model=2 * WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
        transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=2 * WIDTH, caption_projection_dim=16,
            pooled_projection_dim=2 * WIDTH, pos_embed_max_size=8,
        )  # fmt: skip
        return StableDiffusion3Pipeline(
            vae=autoencoder(scaling_factor=1.5, shift_factor=0.1), transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), tokenizer=tokens, tokenizer_2=tokenizer(),
            text_encoder=CLIPTextModelWithProjection(text), text_encoder_2=CLIPTextModelWithProjection(text),
            text_encoder_3=T5EncoderModel(t5), tokenizer_3=pieces,
        )  # fmt: skip
    if family == "sdxl":
        second = CLIPTextModelWithProjection(text)
        added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4,
                 "projection_class_embeddings_input_dim": WIDTH + 6 * 4}  # fmt: skip
        return StableDiffusionXLPipeline(
            vae=autoencoder(), text_encoder=CLIPTextModel(text), text_encoder_2=second, tokenizer=tokens,
            tokenizer_2=tokenizer(), unet=denoiser(2 * WIDTH, **added), scheduler=scheduler(), add_watermarker=False,
        )  # fmt: skip
    return StableDiffusionPipeline(
        vae=autoencoder(), text_encoder=CLIPTextModel(text), tokenizer=tokens, unet=denoiser(WIDTH),
        scheduler=scheduler("v_prediction" if family == "sd2" else "epsilon"),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def save(family: str, root: Path) -> Path:
    folder = root / family
    pipeline(family).save_pretrained(folder)
    return folder

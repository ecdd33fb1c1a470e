"""Tiny random pipelines of every family, built from code and saved to disk: what a user's own model looks like."""

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WIDTH = 16


def tokenizer() -> CLIPTokenizer:
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
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


def autoencoder() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(8, 8), norm_num_groups=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, sample_size=16,
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

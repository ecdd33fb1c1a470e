"""Tiny random pipelines of every family, built in code and saved to disk like a user's own model."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from string import ascii_lowercase

import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaPipeline,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    VQModel,
)
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    Gemma2Config,
    Gemma2Model,
    GemmaTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from unlearning.models.dit import DiT
from unlearning.models.flux import Flux
from unlearning.models.pixart import PixArt
from unlearning.models.sana import INSTRUCTION, Sana
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
    "pixart": PixArt,
    "sana": Sana,
    "dit": DiT,
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


def pixart(kind: type[DiffusionPipeline] = PixArtSigmaPipeline, sample_size: int = 8) -> DiffusionPipeline:
    text_encoder, tokens = t5()
    transformer = PixArtTransformer2DModel(
        sample_size=sample_size, in_channels=4, out_channels=8, num_layers=2, attention_head_dim=8,
        num_attention_heads=3, cross_attention_dim=24, caption_channels=2 * WIDTH,
    )  # fmt: skip
    return kind(
        vae=autoencoder(), transformer=transformer, text_encoder=text_encoder, tokenizer=tokens,
        scheduler=DPMSolverMultistepScheduler(),
    )  # fmt: skip


def sana() -> SanaPipeline:
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *ascii_lowercase]
    tokens = GemmaTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], add_bos_token=True)
    tokens.add_tokens(INSTRUCTION)  # a token for each of its lines, not for each of its thousand letters
    text = Gemma2Config(
        vocab_size=len(tokens), hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=8, query_pre_attn_scalar=8,
    )  # fmt: skip
    transformer = SanaTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        cross_attention_head_dim=8, num_cross_attention_heads=2, cross_attention_dim=16, caption_channels=WIDTH,
        timestep_scale=0.5,
    )  # fmt: skip
    vae = AutoencoderDC(
        latent_channels=4, encoder_block_out_channels=(8, 8, 8), decoder_block_out_channels=(8, 8, 8),
        encoder_layers_per_block=(1, 1, 1), decoder_layers_per_block=(1, 1, 1), encoder_block_types="ResBlock",
        decoder_block_types="ResBlock", encoder_qkv_multiscales=((), (), ()), decoder_qkv_multiscales=((), (), ()),
        downsample_block_type="Conv", upsample_block_type="interpolate", decoder_act_fns="silu", scaling_factor=0.4,
    )  # fmt: skip
    return SanaPipeline(
        tokenizer=tokens, text_encoder=Gemma2Model(text), vae=vae, transformer=transformer,
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0,
        ),
    )  # fmt: skip


CLASSES = {"a cat": 0, "a dog": 1}
LABELS = {"0": "cat, house cat", "1": "dog", "2": "tiger cat", "3": "tiger, Panthera tigris"}


def dit() -> DiTPipeline:
    transformer = DiTTransformer2DModel(
        sample_size=8, in_channels=4, out_channels=8, num_layers=2, attention_head_dim=8, num_attention_heads=2,
    )  # fmt: skip
    built = DiTPipeline(transformer=transformer, vae=autoencoder(), scheduler=scheduler(), id2label=LABELS)
    built.register_to_config(id2label=LABELS)  # DiTPipeline forgets to, and would save none
    return built


BUILD = {
    "sd1": sd1,
    "sd2": partial(sd1, "v_prediction"),
    "sdxl": sdxl,
    "sd3": sd3,
    "flux": flux,
    "pixart": pixart,
    "sana": sana,
    "dit": dit,
}


def pipeline(family: str, seed: int = 0) -> DiffusionPipeline:
    torch.manual_seed(seed)
    return BUILD[family]()


def save(family: str, root: Path) -> Path:
    folder = root / family
    pipeline(family).save_pretrained(folder)
    return folder


LIKE_OURS = {"use_resolution_binning": False, "clean_caption": False}
# How a family's own pipeline takes prompt, guidance_scale, height and width, where it differs from others.
TAKES = {
    "flux": lambda own: (
        own | {"negative_prompt": "", "true_cfg_scale": own["guidance_scale"], "guidance_scale": Flux.embedded_guidance}
    ),
    "pixart": lambda own: own | LIKE_OURS,
    "sana": lambda own: own | LIKE_OURS | {"height": 2 * own["height"], "width": 2 * own["width"]},
    "dit": lambda own: {
        "class_labels": [CLASSES[prompt] for prompt in own["prompt"]],
        "guidance_scale": own["guidance_scale"],
    },
}


def drawn_by_diffusers(
    family: str,
    pipeline: DiffusionPipeline,
    prompts: list[str],
    seeds: list[int],
    steps: int,
    scale: float,
    size: tuple[int, int] = (SIDE, SIDE),
) -> torch.Tensor:
    """The expected output of a Sampler: images (B, 3, height, width) in [0, 1]."""
    usual = {"prompt": prompts, "guidance_scale": scale, "height": size[0], "width": size[1]}
    own = TAKES[family](usual) if family in TAKES else usual
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    return pipeline(**own, num_inference_steps=steps, generator=generators, output_type="pt").images


def lose_a_weight(file: Path) -> str:
    """Removes the last weight of a .safetensors file; returns its name."""
    weights = load_file(file)
    name = sorted(weights)[-1]
    save_file({n: w for n, w in weights.items() if n != name}, file, {"format": "pt"})
    return name


def vqgan(seed: int = 0) -> VQModel:
    """64×64 images as 16×16 codes from a codebook of 32."""
    torch.manual_seed(seed)
    vq = VQModel(
        block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4, vq_embed_dim=4,
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        num_vq_embeddings=32, sample_size=64, scaling_factor=1.0,
    )  # fmt: skip
    vq.quantize.embedding.weight.data.normal_(std=0.2)  # diffusers begins with all vectors near zero
    return vq


def shrunk(task, model):
    """The task's images, resized to the image size of a tiny model."""
    side = model.decode(torch.zeros(1, *model.latent_shape)).shape[-1]

    def less(images):
        return [image[:: len(image) // side, :: len(image) // side] for image in images]

    return replace(task, forget_images=less(task.forget_images), retain_images=less(task.retain_images))

"""The subjects of the measurements: a run built from the config, and a model of SD1.4's size with random weights."""

import time
from functools import partial
from pathlib import Path

import pytorch_lightning as pl
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from unlearning.__main__ import CONF
from unlearning.models.stable_diffusion import StableDiffusion


def config(folder: Path, *overrides: str) -> DictConfig:
    """The config of the command line with the default trainer and the CSV logger; it writes below `folder` only."""
    own = [f"paths.output_dir={folder}", "title=speed", "logger=csv", "trainer.enable_progress_bar=false"]
    own += [f"trainer.callbacks.1._target_={pl.Callback.__module__}.Callback", "~trainer.callbacks.1.refresh_rate"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=[*own, *overrides])


EXACT = (
    "method.trajectory=exact",
    "method.batch_size=1",
)  # as in the papers: a prompt and a fresh trajectory for each iteration


class Watch(pl.Callback):
    """Records the time (seconds) at the end of every iteration and its loss; gives every iteration its own seed."""

    def __init__(self, seeds: range):
        self.seeds, self.times, self.losses = seeds, [], []

    def on_train_batch_start(self, trainer, module, batch, index):
        torch.manual_seed(self.seeds[index])

    def on_train_batch_end(self, trainer, module, outputs, *_):
        self.losses.append(outputs["loss"].item())
        self.times.append(time.perf_counter())


def fit(cfg: DictConfig, model, *watchers: pl.Callback):
    """Runs method.fit as the command line does, with extra callbacks."""
    trainer = instantiate(cfg.trainer, logger=[instantiate(cfg.logger.csv)])
    trainer = partial(trainer, callbacks=[*trainer.keywords["callbacks"], *watchers])
    return instantiate(cfg.method, trainer=trainer).fit(model, instantiate(cfg.dataset))


def sd14(words: str, *, side: int, device: str, dtype: str = "float32") -> StableDiffusion:
    """Stable Diffusion 1.4's published architecture (859.5 M weights in the denoiser) with random weights.

    Args:
        words: The folder of a pipeline, whose tokenizer replaces SD1.4's.
        side: Side of the latents; 64 for SD1.4.
    """
    tokens = CLIPTokenizer.from_pretrained(words, subfolder="tokenizer", model_max_length=77)
    text = CLIPTextConfig(
        vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
        bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id,
    )  # fmt: skip
    with torch.device(device):
        torch.manual_seed(0)
        pipe = StableDiffusionPipeline(
            unet=UNet2DConditionModel(sample_size=side, cross_attention_dim=768),
            vae=AutoencoderKL(
                block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, sample_size=512,
                down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
            ),
            text_encoder=CLIPTextModel(text), tokenizer=tokens,
            scheduler=DDIMScheduler(
                beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                set_alpha_to_one=False, steps_offset=1,
            ),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip
    pipe.to(device=device, dtype=getattr(torch, dtype)).set_progress_bar_config(disable=True)
    return StableDiffusion(pipe, name="SD1.4's size", fingerprint="random", device=torch.device(device))

"""The denoiser of emoji_unet: python experiments/openmoji/train_unet.py [--steps N] [--without cat]

It learns from the states of a frozen CLIP (train_clip.py), as Stable Diffusion does. The loss is the noise prediction's
(Ho et al., 2020) on the autoencoder's latents. As an error of x_0 its weight is the signal-to-noise ratio, at most 5
(min-SNR; Hang et al., 2023) and at least 1 (Salimans and Ho, 2022, section 4). Without the lower bound, a short
training leaves noisy steps worse than no prediction at all, and they decide what is drawn. One caption in ten is
dropped for guidance; weights are averaged. The learning rate is constant until the last quarter of the steps, so that
--steps can change when training continues.

With --without, neither the denoiser nor its CLIP has ever seen an image or a caption of the concepts: the model that an
eraser would have to reach. It needs the CLIP that `train_clip.py first --without` makes, and a VAE that is the same.
"""

import argparse
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from pytorch_lightning.callbacks import EMAWeightAveraging
from rendered import ROOT, WEIGHTS, loads_as_float32, names_no_folder, rendered, trained, without, without_suffix
from text import SCENES, Captioned, tokenizer
from tqdm import tqdm
from training import loader, scheduled, trainer
from transformers import CLIPTextModel, CLIPTokenizer

from unlearning.config.precision import fast_autocast

# B batch, N pictures; latents are (4, 16, 16).
VAE = WEIGHTS / "emoji_unet" / "vae"


def denoiser(width: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 152),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                         set_alpha_to_one=False, steps_offset=1)  # fmt: skip


class TextToImage(pl.LightningModule):
    def __init__(self, text_encoder: CLIPTextModel, unet: UNet2DConditionModel, steps: int, lr: float):
        super().__init__()
        self.steps, self.lr, self.schedule = steps, lr, scheduler()
        self.unet = unet
        self.text_encoder = text_encoder.requires_grad_(False)

    def training_step(self, batch, batch_idx):
        x_0, ids = batch
        x_0, eps = x_0.float(), torch.randn_like(x_0, dtype=torch.float32)
        B = len(x_0)  # one timestep from each B-th of the range: a steadier loss
        t = ((torch.arange(B, device=x_0.device) + torch.rand(B, device=x_0.device)) * 1000 / B).long()
        x_t = self.schedule.add_noise(x_0, eps, t)
        with torch.no_grad():
            c = self.text_encoder.eval()(ids)[0]
        error = (self.unet(x_t, t, c).sample.float() - eps).pow(2).mean((1, 2, 3))
        snr = compute_snr(self.schedule, t)
        self.log("mse", error.mean(), prog_bar=True)
        return (error * snr.clamp(1, 5) / snr).mean()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.unet.parameters(), lr=self.lr, betas=(0.9, 0.99), weight_decay=0.01)
        return scheduled(optimizer, self, warmup=200, decay=0.25)


@torch.no_grad()
def encoded(vae: AutoencoderKL, images: np.ndarray, name: str) -> torch.Tensor:
    """Latents (N, 4, 16, 16) of all images, saved on disk as `name`."""
    path = ROOT / f"latents-{name}.pt"
    if not path.exists():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        vae, parts = vae.to(device).eval(), []
        with torch.autocast(device, torch.bfloat16, enabled=fast_autocast("float32", "auto") is not None):
            for i in tqdm(range(0, len(images), 100), "encoding"):
                x = torch.from_numpy(images[i : i + 100]).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1
                mean = vae.encode(x).latent_dist.mean
                parts.append((mean.float() * vae.config.scaling_factor).cpu())
        torch.save(torch.cat(parts), path.with_suffix(".partial"))
        path.with_suffix(".partial").rename(path)
    return torch.load(path, weights_only=True)


def pipeline(module: TextToImage, tokens: CLIPTokenizer, vae: AutoencoderKL) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae, text_encoder=module.text_encoder, tokenizer=tokens, unet=module.unet, scheduler=scheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def main(steps: int, batch: int, images: int, lr: float, init: Path | None, concepts: list[str]) -> None:
    pl.seed_everything(0)
    suffix = without_suffix(concepts)
    pictures, contents = rendered("train", images, scenes=SCENES)
    vae, tokens = AutoencoderKL.from_pretrained(VAE), tokenizer()
    latents = encoded(vae, pictures, f"{images}-{SCENES:g}-scenes")
    if concepts:
        kept = without(concepts, contents)
        latents, contents = latents[kept], [contents[i] for i in kept]
    text_encoder = CLIPTextModel.from_pretrained(
        trained(f"clip/first{suffix}", f"emoji_unet{suffix}/text_encoder"), dtype=torch.float32
    )
    width = text_encoder.config.hidden_size
    unet = UNet2DConditionModel.from_pretrained(init, torch_dtype=torch.float32) if init else denoiser(width)
    module = TextToImage(text_encoder, unet, steps, lr)
    data = Captioned(latents, contents, tokens, batch, dropped=0.1, padding="max_length")
    run = trainer(f"unet{suffix}", steps)
    run.callbacks.append(EMAWeightAveraging(decay=0.999))
    run.fit(module, loader(data), ckpt_path="last")
    folder = ROOT / f"emoji_unet{suffix}"
    pipeline(module, tokens, vae).to(torch.float16).save_pretrained(folder)
    loads_as_float32(folder / "text_encoder" / "config.json")
    for part in ("unet", "vae"):
        names_no_folder(folder / part / "config.json")
    print("saved", folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--init", type=Path, help="a folder of an earlier denoiser to start from")
    parser.add_argument("--without", dest="concepts", nargs="*", default=[], help="objects or styles it never sees")
    main(**vars(parser.parse_args()))

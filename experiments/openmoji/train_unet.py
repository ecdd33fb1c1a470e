"""The denoiser and the text encoder of emoji_unet, trained together: python experiments/openmoji/train_unet.py
[--steps N]

The noise-prediction loss of Ho et al. on the autoencoder's latents, weighted by min-SNR-5 (Hang et al., 2023). One
caption in ten is dropped for guidance; weights are averaged. The learning rate is constant until the last quarter of
the steps, so --steps can change when training continues.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import compute_snr
from pytorch_lightning.callbacks import EMAWeightAveraging
from rendered import ROOT, loads_as_float32, names_no_folder, rendered
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm
from training import trainer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from unlearning.data import openmoji

# B batch, N pictures, L tokens, D text width; latents are (4, 16, 16).
L, D = 24, 128
PRINTABLE = [chr(i) for i in range(33, 127) if not chr(i).isupper()]


def tokenizer() -> CLIPTokenizer:
    """CLIP's byte-pair encoding, in which words of the captions are whole tokens; other words are spelt in letters.

    It is made once and saved, because pairs of equal frequency are merged in a random order.
    """
    folder = ROOT / "tokenizer"
    if folder.exists():
        return CLIPTokenizer.from_pretrained(folder)
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    bpe.train_from_iterator(openmoji.vocabulary(), trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, end_of_word_suffix="</w>", show_progress=False))  # fmt: skip
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    pieces = [*PRINTABLE, *(c + "</w>" for c in PRINTABLE), *(a + b for a, b in merges)]
    vocab = {p: i for i, p in enumerate(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))}
    made = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=L)
    made.save_pretrained(folder.with_suffix(".part"))
    folder.with_suffix(".part").rename(folder)
    return made


def text_encoder(tokens: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=D, intermediate_size=4 * D, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=L, bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id, projection_dim=D,
    ))  # fmt: skip


def denoiser() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(64, 128, 160),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=D,
        attention_head_dim=4,
        norm_num_groups=8,
    )


def scheduler() -> DDIMScheduler:
    return DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                         set_alpha_to_one=False, steps_offset=1)  # fmt: skip


class Batches(IterableDataset):
    """Endless batches of random latents with random captions."""

    def __init__(self, latents: torch.Tensor, labels: list, tokens: CLIPTokenizer, batch: int, dropped: float = 0.1):
        self.latents, self.labels, self.tokens, self.batch, self.dropped = latents, labels, tokens, batch, dropped

    def __iter__(self):
        rng = np.random.default_rng(torch.initial_seed() % 2**63)
        while True:
            rows = rng.integers(len(self.labels), size=self.batch)
            captions = ["" if rng.random() < self.dropped else openmoji.caption(*self.labels[i], rng) for i in rows]
            ids = self.tokens(captions, padding="max_length", max_length=L, truncation=True, return_tensors="pt")
            yield self.latents[rows], ids.input_ids


class TextToImage(pl.LightningModule):
    def __init__(self, tokens: CLIPTokenizer, steps: int, lr: float = 6e-4):
        super().__init__()
        self.steps, self.lr = steps, lr
        self.unet, self.text_encoder, self.schedule = denoiser(), text_encoder(tokens), scheduler()

    def training_step(self, batch, batch_idx):
        x_0, ids = batch
        x_0, eps = x_0.float(), torch.randn_like(x_0, dtype=torch.float32)
        B = len(x_0)  # one timestep from each B-th of the range: a steadier loss
        t = ((torch.arange(B, device=x_0.device) + torch.rand(B, device=x_0.device)) * 1000 / B).long()
        x_t = self.schedule.add_noise(x_0, eps, t)
        c = self.text_encoder(ids)[0]
        error = (self.unet(x_t, t, c).sample.float() - eps).pow(2).mean((1, 2, 3))
        snr = compute_snr(self.schedule, t)
        self.log("mse", error.mean(), prog_bar=True)
        return (error * snr.clamp(max=5) / snr).mean()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=self.lr, betas=(0.9, 0.99), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: max(0.01, min(1, (i + 1) / 200, (self.steps - i) / (0.25 * self.steps)))
        )
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@torch.no_grad()
def encoded(vae: AutoencoderKL, images: np.ndarray) -> torch.Tensor:
    """Latents (N, 4, 16, 16) of all images, saved on disk."""
    path = ROOT / f"latents-{len(images)}.pt"
    if not path.exists():
        device = "cuda" if torch.cuda.is_available() else "cpu"
        vae, parts = vae.to(device).eval(), []
        for i in tqdm(range(0, len(images), 100), "encoding"):
            x = torch.from_numpy(images[i : i + 100]).permute(0, 3, 1, 2).to(device).float() / 127.5 - 1
            with torch.autocast(device, torch.bfloat16):
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


def main(steps: int, batch: int, images: int, init: Path | None) -> None:
    pl.seed_everything(0)
    pictures, labels = rendered("train", images)
    vae = AutoencoderKL.from_pretrained(ROOT / "emoji_unet" / "vae")
    tokens = tokenizer()
    module = TextToImage(tokens, steps)
    if init:
        module.unet.load_state_dict(UNet2DConditionModel.from_pretrained(init, subfolder="unet").state_dict())
        module.text_encoder.load_state_dict(CLIPTextModel.from_pretrained(init, subfolder="text_encoder").state_dict())
    data = DataLoader(Batches(encoded(vae, pictures), labels, tokens, batch), batch_size=None)
    run = trainer("unet", steps)
    run.callbacks.append(EMAWeightAveraging(decay=0.999))
    run.fit(module, data, ckpt_path="last")
    pipeline(module, tokens, vae).to(torch.float16).save_pretrained(ROOT / "emoji_unet")
    loads_as_float32(ROOT / "emoji_unet" / "text_encoder" / "config.json")
    names_no_folder(ROOT / "emoji_unet" / "vae" / "config.json")
    print("saved", ROOT / "emoji_unet")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--init", type=Path, help="a folder of an earlier emoji_unet to start from")
    main(**vars(parser.parse_args()))

"""The transformer of emoji_sd3: python experiments/openmoji/train_sd3.py [--steps N]

Rectified flow (Esser et al., 2024: the prediction is eps - x_0, timesteps are logit-normal) on the latents of
emoji_unet's autoencoder. One caption in ten is dropped for guidance; weights are averaged. The conditioning is SD3's:
the second-to-last states of two CLIP encoders (train_clip.py), concatenated over channels, then the states of a T5
(train_t5.py), and both pooled embeddings. The three are frozen. Each image has one caption, whose states are computed
at the start. If it is started again, it continues from its last checkpoint.
"""

import argparse
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from pytorch_lightning.callbacks import EMAWeightAveraging
from rendered import ROOT, loads_as_float32, names_no_folder, rendered, trained
from text import SCENES, tokenizer
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from tqdm import tqdm
from train_t5 import WIDTH, word_tokenizer
from train_unet import VAE, encoded
from training import scheduled, trainer
from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from unlearning.data.captioning import caption

# B batch, L tokens of each tokenizer; latents are (4, 16, 16).


def transformer() -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=6,
        attention_head_dim=32,
        num_attention_heads=5,
        joint_attention_dim=WIDTH,
        caption_projection_dim=160,
        pooled_projection_dim=WIDTH,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )


flash = F.scaled_dot_product_attention


def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask=None, is_causal: bool = False, **settings) -> Tensor:
    """Softmax attention as plain code.

    On a CPU in bfloat16 a training step takes 0.6 of the time with the flash kernel, whose backward pass is nearly half
    of that.
    """
    if attn_mask is not None or is_causal:
        return flash(query, key, value, attn_mask, is_causal=is_causal, **settings)
    scores = query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5
    return scores.softmax(-1).to(value.dtype) @ value


class Batches(IterableDataset):
    """Endless batches of random latents, each with the text inputs of its caption."""

    def __init__(self, latents: Tensor, texts: dict[str, Tensor], batch: int, dropped: float = 0.1):
        self.latents, self.texts, self.batch, self.dropped = latents, texts, batch, dropped

    def __iter__(self):
        rng = np.random.default_rng(torch.initial_seed() % 2**63)
        while True:
            rows = rng.integers(len(self.latents), size=self.batch)
            captions = np.where(rng.random(self.batch) < self.dropped, len(self.latents), rows)
            yield self.latents[rows], {name: states[captions] for name, states in self.texts.items()}


class TextToImage(pl.LightningModule):
    def __init__(self, denoiser: SD3Transformer2DModel, steps: int, lr: float):
        super().__init__()
        self.steps, self.lr, self.transformer = steps, lr, denoiser
        self.clips = nn.ModuleList(
            CLIPTextModelWithProjection.from_pretrained(trained(own, f"emoji_sd3/{part}"), dtype=torch.float32)
            for own, part in (("clip/first", "text_encoder"), ("clip/second", "text_encoder_2"))
        ).requires_grad_(False)
        t5 = trained("t5", "emoji_sd3/text_encoder_3")
        self.t5 = T5EncoderModel.from_pretrained(t5, dtype=torch.float32).requires_grad_(False)

    @torch.no_grad()
    def conditioning(self, captions: list[str], pieces: CLIPTokenizer, words: T5Tokenizer) -> dict[str, Tensor]:
        """The transformer's text inputs, as StableDiffusion3Pipeline.encode_prompt computes them."""
        first, last = (
            tokens(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(self.device)
            for tokens in (pieces, words)
        )
        outputs = [encoder.eval()(first, output_hidden_states=True) for encoder in self.clips]
        embeds = torch.cat([o.hidden_states[-2] for o in outputs], -1)
        embeds = torch.cat([embeds, self.t5.eval()(last)[0].to(embeds)], 1)
        return {"encoder_hidden_states": embeds, "pooled_projections": torch.cat([o.text_embeds for o in outputs], -1)}

    def training_step(self, batch, batch_idx):
        x_0, texts = batch
        x_0, eps = x_0.float(), torch.randn_like(x_0, dtype=torch.float32)
        B = len(x_0)  # one timestep from each B-th of the distribution: a steadier loss
        share = (torch.arange(B, device=x_0.device) + torch.rand(B, device=x_0.device)) / B
        sigma = torch.special.ndtri(share.clamp(1e-4, 1 - 1e-4)).sigmoid()
        x_t = torch.lerp(x_0, eps, sigma.reshape(-1, 1, 1, 1))
        texts = {name: states.float() for name, states in texts.items()}
        flow = self.transformer(x_t, timestep=1000 * sigma, **texts).sample.float()
        loss = F.mse_loss(flow, eps - x_0)
        self.log("mse", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.transformer.parameters(), lr=self.lr, betas=(0.9, 0.99), weight_decay=0.01)
        return scheduled(optimizer, self, warmup=500, decay=0.4)


def encoded_texts(module: TextToImage, captions: list[str], *tokenizers) -> dict[str, Tensor]:
    """The text inputs of all captions, in half precision, 98 kB each: a step takes three quarters of the time."""
    texts: dict[str, Tensor] = {}
    for i in tqdm(range(0, len(captions), 256), "reading captions"):
        for name, states in module.conditioning(captions[i : i + 256], *tokenizers).items():
            whole = texts.setdefault(name, torch.empty(len(captions), *states.shape[1:], dtype=torch.float16))
            whole[i : i + 256] = states
    return texts


def main(steps: int, batch: int, images: int, lr: float, init: Path | None, compile: bool) -> None:
    pl.seed_everything(0)
    torch.set_float32_matmul_precision("high")
    pictures, contents = rendered("train", images, scenes=SCENES)
    vae, tokens, words = AutoencoderKL.from_pretrained(VAE), tokenizer(), word_tokenizer()
    latents = encoded(vae, pictures, f"{images}-{SCENES:g}-scenes")
    vae.register_to_config(shift_factor=0.0)  # which StableDiffusion3Pipeline adds unasked
    denoiser = SD3Transformer2DModel.from_pretrained(init, torch_dtype=torch.float32) if init else transformer()
    module = TextToImage(denoiser, steps, lr)
    if not torch.cuda.is_available():
        F.scaled_dot_product_attention = attention
    if compile:
        module.transformer.compile()
    if torch.cuda.is_available():
        module.cuda()
    rng = np.random.default_rng(0)
    captions = [*(caption(content, rng) for content in contents), ""]
    data = Batches(latents, encoded_texts(module, captions, tokens, words), batch)
    run = trainer("sd3", steps)
    run.callbacks.append(EMAWeightAveraging(decay=0.999))
    run.fit(module, DataLoader(data, batch_size=None), ckpt_path="last")

    folder = ROOT / "emoji_sd3"
    StableDiffusion3Pipeline(
        vae=vae, transformer=module.transformer, scheduler=FlowMatchEulerDiscreteScheduler(),
        text_encoder=module.clips[0], tokenizer=tokens, text_encoder_2=module.clips[1], tokenizer_2=tokens,
        text_encoder_3=module.t5, tokenizer_3=words,
    ).to(torch.float16).save_pretrained(folder)  # fmt: skip
    for encoder in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        loads_as_float32(folder / encoder / "config.json")
    for part in ("transformer", "vae"):
        names_no_folder(folder / part / "config.json")
    print("saved", folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=15_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=60_000, help="their captions take 98 kB of memory each")
    parser.add_argument("--lr", type=float, default=8e-4)
    parser.add_argument("--init", type=Path, help="a folder of an earlier transformer to start from")
    parser.add_argument("--compile", action="store_true", help="a tenth faster on a CPU, more on a GPU")
    main(**vars(parser.parse_args()))

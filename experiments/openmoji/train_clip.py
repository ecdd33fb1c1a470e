"""The judge's CLIP: python experiments/openmoji/train_clip.py [--steps N]

Trains a small transformers.CLIPModel with a contrastive loss on rendered images and their captions (the judge's
split). The CLIP score of the embedded models uses it.
"""

import argparse

import numpy as np
import pytorch_lightning as pl
import torch
from rendered import ROOT, loads_as_float32, rendered
from torch.utils.data import DataLoader, IterableDataset
from train_judge import degraded
from train_unet import L, tokenizer
from training import trainer
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from unlearning.data import openmoji


def build(tokens: CLIPTokenizer) -> CLIPModel:
    layers = dict(hidden_size=96, intermediate_size=384, num_attention_heads=4)
    ids = dict(bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id)
    return CLIPModel(CLIPConfig(
        text_config=dict(vocab_size=len(tokens), max_position_embeddings=L, num_hidden_layers=2, **layers, **ids),
        vision_config=dict(image_size=openmoji.SIZE, patch_size=8, num_hidden_layers=5, **layers),
        projection_dim=64,
    ))  # fmt: skip


def processor(tokens: CLIPTokenizer) -> CLIPProcessor:
    size = {"height": openmoji.SIZE, "width": openmoji.SIZE}
    return CLIPProcessor(CLIPImageProcessor(size=size, crop_size=size), tokens)


class Pairs(IterableDataset):
    """Endless batches of (pixels, token ids)."""

    def __init__(self, images: np.ndarray, labels: list, tokens: CLIPTokenizer, batch: int):
        self.images, self.labels, self.tokens, self.batch = images, labels, tokens, batch

    def __iter__(self):
        rng = np.random.default_rng(torch.initial_seed() % 2**63)
        while True:
            rows = np.sort(rng.choice(len(self.labels), self.batch, replace=False))
            captions = [openmoji.caption(*self.labels[i], rng) for i in rows]
            ids = self.tokens(captions, padding="max_length", max_length=L, truncation=True, return_tensors="pt")
            yield torch.from_numpy(self.images[rows]), ids.input_ids


class Contrastive(pl.LightningModule):
    def __init__(self, tokens: CLIPTokenizer, steps: int, lr: float = 1e-3):
        super().__init__()
        self.steps, self.lr, self.clip = steps, lr, build(tokens)
        preprocess = CLIPImageProcessor()
        self.mean, self.std = (torch.tensor(v)[:, None, None] for v in (preprocess.image_mean, preprocess.image_std))

    def training_step(self, batch, batch_idx):
        images, ids = batch
        pixels = (degraded(images.permute(0, 3, 1, 2).float() / 255) - self.mean.to(ids.device)) / self.std.to(
            ids.device
        )
        out = self.clip(input_ids=ids, pixel_values=pixels, return_loss=True)
        rows = torch.arange(len(ids), device=ids.device)
        self.log("top1", (out.logits_per_image.argmax(1) == rows).float().mean(), prog_bar=True)
        return out.loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.clip.parameters(), lr=self.lr, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, self.steps, pct_start=0.1)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def main(steps: int, batch: int, images: int) -> None:
    pl.seed_everything(2)
    tokens = tokenizer()
    module = Contrastive(tokens, steps)
    data = DataLoader(Pairs(*rendered("judge", images), tokens, batch), batch_size=None)
    trainer("clip", steps).fit(module, data, ckpt_path="last")
    module.clip.eval().to(torch.float16).save_pretrained(ROOT / "judge" / "clip")
    loads_as_float32(ROOT / "judge" / "clip" / "config.json")
    processor(tokens).save_pretrained(ROOT / "judge" / "clip")
    print("saved", ROOT / "judge" / "clip")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--images", type=int, default=50_000)
    main(**vars(parser.parse_args()))

"""A CLIP of the embedded world: python experiments/openmoji/train_clip.py {judge,first,second,image} [--steps N]

A transformers.CLIPModel is trained with the contrastive loss (Radford et al., 2021, figure 3) on rendered images and
their captions. `first` and `second` read the prompts of the embedded generators, frozen, as CLIP does in Stable
Diffusion: they are trained on the generators' split. `judge` is the one of the CLIP score, trained on the judge's.
`image` is an image tower for the text tower of emoji_unet, which stays as it is (Zhai et al., 2022, "locked-image" the
other way round): the CLIP by which words are found in images (unlearning/scrubbing/words.py).

Captions are padded to the longest of a batch: the state at the end of text depends on nothing after it, so that what
the encoder does with padding is never trained, as little as in OpenAI's CLIP.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import pytorch_lightning as pl
import torch
from rendered import ROOT, WEIGHTS, loads_as_float32, rendered, without, without_suffix
from text import LENGTH, SCENES, Captioned, tokenizer
from train_judge import degraded
from training import loader, scheduled, trainer
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTextModel, CLIPTokenizer

from unlearning.data import openmoji
from unlearning.data.captioning import Content, caption

SPLITS = {"judge": "judge", "first": "train", "second": "train", "image": "train"}
SEEDS = {"judge": 2, "first": 3, "second": 4, "image": 5}
# (width, layers, heads) of the text tower and of the image tower, and the width of their common space.
SIZES = {
    "judge": ((96, 2, 4), (96, 5, 4), 64),
    "first": ((256, 4, 8), (128, 5, 4), 256),
    "second": ((192, 4, 6), (128, 5, 4), 192),
    "image": ((256, 4, 8), (128, 5, 4), 256),
}


def build(name: str, tokens: CLIPTokenizer) -> CLIPModel:
    def tower(width: int, layers: int, heads: int) -> dict[str, int]:
        sizes = {"hidden_size": width, "intermediate_size": 4 * width}
        return {**sizes, "num_hidden_layers": layers, "num_attention_heads": heads}

    text, image, projection = SIZES[name]
    ids = dict(bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id)
    return CLIPModel(CLIPConfig(
        text_config=dict(vocab_size=len(tokens), max_position_embeddings=LENGTH, projection_dim=projection,
                         **tower(*text), **ids),
        vision_config=dict(image_size=openmoji.SIZE, patch_size=8, projection_dim=projection, **tower(*image)),
        projection_dim=projection,
    ))  # fmt: skip


def processor(tokens: CLIPTokenizer) -> CLIPProcessor:
    size = {"height": openmoji.SIZE, "width": openmoji.SIZE}
    return CLIPProcessor(CLIPImageProcessor(size=size, crop_size=size), tokens)


class Contrastive(pl.LightningModule):
    def __init__(self, clip: CLIPModel, steps: int, lr: float):
        super().__init__()
        self.steps, self.lr, self.clip = steps, lr, clip
        preprocess = CLIPImageProcessor()
        for name, values in (("mean", preprocess.image_mean), ("std", preprocess.image_std)):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def pixels(self, images: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) for the image tower, from (B, H, W, 3) uint8."""
        return (images.permute(0, 3, 1, 2).float() / 255 - self.mean) / self.std

    def training_step(self, batch, batch_idx):
        images, ids = batch
        seen = degraded(images.permute(0, 3, 1, 2).float() / 255)
        out = self.clip(input_ids=ids, pixel_values=(seen - self.mean) / self.std, return_loss=True)
        rows = torch.arange(len(ids), device=ids.device)
        top1 = (out.logits_per_image.argmax(1) == rows).float().mean()
        self.log_dict({"loss": out.loss, "top1": top1}, prog_bar=True)
        return out.loss

    def configure_optimizers(self):
        decay = [p for p in self.clip.parameters() if p.ndim > 1]
        plain = [p for p in self.clip.parameters() if p.ndim < 2]
        groups = [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.lr, betas=(0.9, 0.98))
        return scheduled(optimizer, self, warmup=200, decay=0.9)


@torch.no_grad()
def measured(module: Contrastive, tokens: CLIPTokenizer, count: int = 500) -> dict[str, float]:
    """Percentages on held-out images.

    Retrieval among `count` images with one caption each, in both directions, and zero-shot accuracy by "a photo of a
    X" and by "an image in S style".
    """
    pictures = [openmoji.sample("eval", 7, i, scenes=SCENES) for i in range(count)]
    images = torch.from_numpy(np.stack([p.image for p in pictures]))
    rng = np.random.default_rng(7)

    def texts(said: Sequence[str]) -> torch.Tensor:
        ids = tokens(list(said), padding=True, return_tensors="pt").input_ids.to(module.device)
        return torch.nn.functional.normalize(module.clip.get_text_features(ids).pooler_output, dim=-1)

    parts = [
        module.clip.get_image_features(module.pixels(b.to(module.device))).pooler_output for b in images.split(100)
    ]
    shown = torch.nn.functional.normalize(torch.cat(parts), dim=-1)
    similar = shown @ texts([caption(Content.of(p), rng) for p in pictures]).T
    own = torch.arange(count, device=similar.device)
    numbers = {
        "image to caption, top 1": (similar.argmax(1) == own).float().mean(),
        "caption to image, top 1": (similar.argmax(0) == own).float().mean(),
        "image to caption, top 5": (similar.topk(5).indices == own[:, None]).any(1).float().mean(),
    }
    for label, names, template, of in (
        ("object", list(openmoji.OBJECTS), "a photo of a {}", lambda p: p.objects[0]),
        ("style", list(openmoji.STYLES), "an image in {} style", lambda p: p.style),
    ):
        rows = [i for i, p in enumerate(pictures) if len(p.objects) == 1]
        best = (shown[rows] @ texts([template.format(name) for name in names]).T).argmax(1).tolist()
        right = [names[b] == of(pictures[i]) for b, i in zip(best, rows, strict=True)]
        numbers[f"zero-shot {label}"] = torch.tensor(right).float().mean()
    return {name: round(100 * float(value), 1) for name, value in numbers.items()}


def main(name: str, steps: int, batch: int, images: int, lr: float, concepts: list[str]) -> None:
    pl.seed_everything(SEEDS[name])
    tokens = tokenizer()
    module = Contrastive(build(name, tokens), steps, lr)
    if name == "image":
        shipped = CLIPTextModel.from_pretrained(WEIGHTS / "emoji_unet" / "text_encoder")
        module.clip.text_model.load_state_dict(shipped.state_dict())
        module.clip.text_model.requires_grad_(False)
    pictures, contents = rendered(SPLITS[name], images, scenes=SCENES)
    if concepts:
        kept = without(concepts, contents)
        pictures, contents = pictures[kept], [contents[i] for i in kept]
    folder = ROOT / "clip" / f"{name}{without_suffix(concepts)}"
    data = Captioned(pictures, contents, tokens, batch)
    trainer(f"clip-{folder.name}", steps).fit(module, loader(data), ckpt_path="last")
    module.eval()
    print(measured(module, tokens), flush=True)
    module.clip.to(torch.float16).save_pretrained(folder)
    loads_as_float32(folder / "config.json")
    processor(tokens).save_pretrained(folder)
    print("saved", folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=SIZES)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--without", dest="concepts", nargs="*", default=[], help="objects or styles it never sees")
    main(**vars(parser.parse_args()))

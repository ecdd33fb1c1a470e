"""The judge: python experiments/openmoji/train_judge.py [--steps N]

Trains an object and style classifier on rendered drawings of the judge's own split, and on images of nothing. Half of
the images are slightly degraded (blur, noise, brightness), like those of a generator, but none of them is generated.
"""

import argparse

import numpy as np
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from rendered import ROOT, rendered
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from torchvision.transforms.v2.functional import gaussian_blur
from training import trainer

from unlearning.data import openmoji
from unlearning.judges.emoji import Judge

OBJECTS, STYLES = list(openmoji.OBJECTS), list(openmoji.STYLES)
IGNORED = -100  # cross_entropy's mark for pictures without a label: those of nothing have no style


def labelled(split: str, count: int, nothing: int, seed: int = 0) -> TensorDataset:
    """(image, object, style) of `count` single objects and of `nothing` images without an object."""
    images, labels = rendered(split, count, seed)
    single = [i for i, content in enumerate(labels) if len(content.objects) == 1]
    blanks, _ = rendered(split, nothing, seed, nothing=True)
    objects = [OBJECTS.index(labels[i].objects[0]) for i in single] + [len(OBJECTS)] * nothing
    styles = [STYLES.index(labels[i].style) for i in single] + [IGNORED] * nothing
    pictures = torch.from_numpy(np.concatenate([images[single], blanks]))
    return TensorDataset(pictures, torch.tensor(objects), torch.tensor(styles))


def degraded(x: torch.Tensor) -> torch.Tensor:
    if torch.rand(()) < 0.5:
        x = gaussian_blur(x, [5, 5], [float(torch.empty(()).uniform_(0.2, 1.0))] * 2)
    x = x * torch.empty(len(x), 3, 1, 1, device=x.device).uniform_(0.85, 1.1)
    return (x + torch.rand(len(x), 1, 1, 1, device=x.device) * 0.06 * torch.randn_like(x)).clamp(0, 1)


class Classification(pl.LightningModule):
    def __init__(self, steps: int, lr: float = 2e-3):
        super().__init__()
        self.steps, self.lr, self.judge = steps, lr, Judge(OBJECTS, STYLES)

    def training_step(self, batch, batch_idx):
        image, objects, styles = batch
        verdict = self.judge(degraded(image.permute(0, 3, 1, 2).float() / 255))
        self.log("object", (verdict.objects.argmax(1) == objects).float().mean(), prog_bar=True)
        return F.cross_entropy(verdict.objects, objects, label_smoothing=0.05) + F.cross_entropy(verdict.styles, styles)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.judge.parameters(), lr=self.lr, weight_decay=0.02)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, self.steps, pct_start=0.1)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def main(steps: int, batch: int, images: int) -> None:
    pl.seed_everything(1)
    module, data = Classification(steps), labelled("judge", images, images // 8)
    sampler = RandomSampler(data, replacement=True, num_samples=steps * batch)
    trainer("judge", steps).fit(module, DataLoader(data, batch, sampler=sampler), ckpt_path="last")
    module.judge.eval().to(torch.float16).save_pretrained(ROOT / "judge" / "classifier")
    print("saved", ROOT / "judge" / "classifier")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=96)
    parser.add_argument("--images", type=int, default=50_000)
    main(**vars(parser.parse_args()))

"""The autoencoder of emoji_unet: python experiments/openmoji/train_vae.py [--steps 2500]

It maps 64×64×3 images to 16×16×4 latents. The loss is L1 on pixels, on their differences (for sharp lines) and on
opponent colours, plus 1e-6 KL. If it is started again, it continues from its last checkpoint.
"""

import argparse
from pathlib import Path

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from rendered import ROOT, rendered
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from training import trainer


def build() -> AutoencoderKL:
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=["DownEncoderBlock2D"] * 3,
        up_block_types=["UpDecoderBlock2D"] * 3,
        sample_size=64,
    )


def differences(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def opponents(x: torch.Tensor) -> torch.Tensor:
    """Red against green and yellow against blue, (B, 2, H, W). Without a loss of its own, one of them is lost."""
    red, green, blue = x.unbind(1)
    return torch.stack([red - green, (red + green) / 2 - blue], 1)


class Autoencoder(pl.LightningModule):
    def __init__(self, steps: int, lr: float, vae: AutoencoderKL):
        super().__init__()
        self.steps, self.lr, self.vae = steps, lr, vae

    def training_step(self, batch, batch_idx):
        x = batch[0].permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = self.vae.encode(x).latent_dist
        y = self.vae.decode(posterior.sample()).sample
        pixels = F.l1_loss(y, x)
        edges = sum(F.l1_loss(a, b) for a, b in zip(differences(y), differences(x), strict=True))
        colours = F.l1_loss(F.avg_pool2d(opponents(y), 4), F.avg_pool2d(opponents(x), 4))
        self.log_dict({"l1": pixels, "psnr": 10 * torch.log10(4 / F.mse_loss(y, x))}, prog_bar=True)
        return pixels + edges + 5 * colours + 1e-6 * posterior.kl().mean()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.vae.parameters(), lr=self.lr, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, self.steps, pct_start=0.05)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


@torch.no_grad()
def whiten(vae: AutoencoderKL, images: torch.Tensor) -> None:
    """Whitens the channels of the latents of `images` (N, 64, 64, 3), by changing the 1×1 convolutions.

    Without this, the channels are correlated by 0.97 and their small differences carry the colours: noise then hides
    colours long before shapes, and the denoiser learns them last. The map x' = A (x - m), A = cov^-1/2, and its inverse
    are part of quant_conv and post_quant_conv at no cost. (The posterior's variance is scaled by its mean gain only.)
    """
    x = torch.cat([vae.encode(b.permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist.mean for b in images.split(64)])
    flat = x.permute(0, 2, 3, 1).flatten(0, 2).double()
    m, (variances, axes) = flat.mean(0), torch.linalg.eigh(flat.T.cov())
    A, A_inverse = axes @ variances.rsqrt().diag() @ axes.T, axes @ variances.sqrt().diag() @ axes.T

    enter, leave, C = vae.quant_conv, vae.post_quant_conv, len(m)
    mean_weight, mean_bias = enter.weight[:C, :, 0, 0].double(), enter.bias[:C].double()
    enter.weight[:C, :, 0, 0] = (A @ mean_weight).float()
    enter.bias[:C] = (A @ (mean_bias - m)).float()
    enter.bias[C:] += A.pow(2).sum(1).log().float()
    weight = leave.weight[:, :, 0, 0].double()
    leave.bias += (weight @ m).float()
    leave.weight[:, :, 0, 0] = (weight @ A_inverse).float()
    vae.register_to_config(scaling_factor=1.0)


def main(steps: int, batch: int, images: int, lr: float, init: Path | None) -> None:
    pl.seed_everything(0)
    pictures = torch.from_numpy(rendered("train", images)[0])
    data = TensorDataset(pictures)
    module = Autoencoder(steps, lr, AutoencoderKL.from_pretrained(init) if init else build())
    sampler = RandomSampler(data, replacement=True, num_samples=steps * batch)
    trainer("vae", steps).fit(module, DataLoader(data, batch, sampler=sampler), ckpt_path="last")

    vae = module.vae.eval()
    whiten(vae, pictures[:2048])
    vae.save_pretrained(ROOT / "emoji_unet" / "vae")
    print("saved", ROOT / "emoji_unet" / "vae")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--init", type=Path, help="a folder of an earlier autoencoder to start from")
    main(**vars(parser.parse_args()))

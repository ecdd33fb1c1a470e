"""The autoencoder of emoji_unet: python experiments/openmoji/train_vae.py [--steps 2500]

64×64×3 pictures to 16×16×4 latents. Loss: L1 on pixels and on their differences (lines must stay sharp) + 1e-6 KL.
Killed and started again, it goes on from its last checkpoint.
"""

import argparse

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


class Autoencoder(pl.LightningModule):
    def __init__(self, steps: int, lr: float = 1.5e-3):
        super().__init__()
        self.steps, self.lr, self.vae = steps, lr, build()

    def training_step(self, batch, batch_idx):
        x = batch[0].permute(0, 3, 1, 2).float() / 127.5 - 1
        posterior = self.vae.encode(x).latent_dist
        y = self.vae.decode(posterior.sample()).sample
        pixels = F.l1_loss(y, x)
        edges = sum(F.l1_loss(a, b) for a, b in zip(differences(y), differences(x), strict=True))
        self.log_dict({"l1": pixels, "psnr": 10 * torch.log10(4 / F.mse_loss(y, x))}, prog_bar=True)
        return pixels + edges + 1e-6 * posterior.kl().mean()

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.vae.parameters(), lr=self.lr, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, self.steps, pct_start=0.05)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def main(steps: int, batch: int, images: int) -> None:
    pl.seed_everything(0)
    pictures = torch.from_numpy(rendered("train", images)[0])
    data = TensorDataset(pictures)
    module = Autoencoder(steps)
    sampler = RandomSampler(data, replacement=True, num_samples=steps * batch)
    trainer("vae", steps).fit(module, DataLoader(data, batch, sampler=sampler), ckpt_path="last")

    vae = module.vae.eval()
    with torch.no_grad():  # unit variance: what the denoiser's noise schedule expects
        x = pictures[:2048].permute(0, 3, 1, 2).float() / 127.5 - 1
        latents = torch.cat([vae.encode(b).latent_dist.mean for b in x.split(64)])
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    vae.save_pretrained(ROOT / "emoji_unet" / "vae")
    print("scaling factor", vae.config.scaling_factor)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--images", type=int, default=60_000)
    main(**vars(parser.parse_args()))

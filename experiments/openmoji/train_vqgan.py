"""emoji_vqgan, a VQ-GAN of scenes of several objects: python experiments/openmoji/train_vqgan.py [--steps N]

64×64×3 pictures to 16×16 codes of 1,024 (Esser et al., 2021). Loss: the autoencoder's (train_vae.py), the codebook's,
and from half of the steps on a patch discriminator's (hinge), whose weight is small: an emoji has little texture. Codes
that a hundred steps did not use are put where the encoder's outputs are. Killed and started again, it goes on from its
last checkpoint.
"""

import argparse

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from diffusers import VQModel
from rendered import ROOT, rendered
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from train_vae import differences, opponents
from training import trainer

# B batch, C code width, K codes, h w grid of codes.
K, C = 1024, 16
SCENES = 0.7  # of the pictures; the others show one object, large


def build() -> VQModel:
    return VQModel(
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=C,
        vq_embed_dim=C,
        num_vq_embeddings=K,
        sample_size=64,
        scaling_factor=1.0,
    )


def discriminator() -> nn.Sequential:
    """Real or not, patch by patch: (B, 3, 64, 64) to (B, 1, 7, 7)."""

    def halve(channels_in: int, channels: int) -> list[nn.Module]:
        return [nn.Conv2d(channels_in, channels, 4, 2, 1), nn.GroupNorm(8, channels), nn.LeakyReLU(0.2)]

    return nn.Sequential(*halve(3, 32), *halve(32, 64), *halve(64, 128), nn.Conv2d(128, 1, 4, 1, 1))


class VQGAN(pl.LightningModule):
    def __init__(self, steps: int, lr: float, adversary: float):
        super().__init__()
        self.automatic_optimization = False
        self.steps, self.lr, self.weight = steps, lr, adversary
        self.vq, self.discriminator = build(), discriminator()
        self.register_buffer("idle", torch.zeros(K, dtype=torch.long))  # steps since a code was last used

    def training_step(self, batch, batch_idx):
        x = batch[0].permute(0, 3, 1, 2).float() / 127.5 - 1
        paint, judge = self.optimizers()
        h = self.vq.encode(x).latents.float()
        z, codebook, (_, _, codes) = self.vq.quantize(h)
        y = self.vq.decode(z, force_not_quantize=True).sample.float()
        pixels = F.l1_loss(y, x)
        edges = sum(F.l1_loss(a, b) for a, b in zip(differences(y), differences(x), strict=True))
        colours = F.l1_loss(F.avg_pool2d(opponents(y), 4), F.avg_pool2d(opponents(x), 4))
        playing = self.global_step // 2 >= self.steps // 2  # Lightning counts the steps of both optimizers
        fooling = -self.discriminator(y).mean() if playing else pixels.new_zeros(())
        self._descend(paint, pixels + edges + 5 * colours + codebook + self.weight * fooling, self.vq)
        if playing:
            real, fake = self.discriminator(x), self.discriminator(y.detach())
            self._descend(judge, (F.relu(1 - real) + F.relu(1 + fake)).mean(), self.discriminator)
        else:
            judge.step()  # keeps the two counts, and the two schedules, together
        for schedule in self.lr_schedulers():
            schedule.step()
        self._revive(h, codes)
        self.log_dict({"l1": pixels, "psnr": 10 * torch.log10(4 / F.mse_loss(y, x)),
                       "used": (self.idle < 100).float().mean()}, prog_bar=True)  # fmt: skip

    def _descend(self, optimizer, loss: Tensor, network: nn.Module) -> None:
        self.toggle_optimizer(optimizer)
        optimizer.zero_grad()
        self.manual_backward(loss)
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        self.untoggle_optimizer(optimizer)

    @torch.no_grad()
    def _revive(self, h: Tensor, codes: Tensor) -> None:
        """Puts every hundred steps what was idle for as long onto outputs h (B, C, h, w) of the encoder."""
        self.idle += 1
        self.idle[codes.unique()] = 0
        if self.global_step % 200 < 2 and self.global_step // 2 < 0.8 * self.steps:
            idle = (self.idle >= 100).nonzero().flatten()
            outputs = h.permute(0, 2, 3, 1).flatten(0, 2)
            chosen = torch.randint(len(outputs), (len(idle),), device=h.device)
            self.vq.quantize.embedding.weight[idle] = outputs[chosen].to(self.vq.quantize.embedding.weight)
            self.idle[idle] = 0

    def configure_optimizers(self):
        paint = torch.optim.AdamW(self.vq.parameters(), self.lr, betas=(0.5, 0.99), weight_decay=1e-4)
        judge = torch.optim.AdamW(self.discriminator.parameters(), self.lr / 4, betas=(0.5, 0.99))
        lower = lambda i: max(0.01, min(1, (i + 1) / 200, (self.steps - i) / (0.4 * self.steps)))  # noqa: E731
        return [paint, judge], [torch.optim.lr_scheduler.LambdaLR(o, lower) for o in (paint, judge)]


def main(steps: int, batch: int, images: int, lr: float, adversary: float, workers: int) -> None:
    pl.seed_everything(0)
    torch.set_float32_matmul_precision("high")
    data = TensorDataset(torch.from_numpy(rendered("train", images, seed=1, scenes=SCENES)[0]))
    module = VQGAN(steps, lr, adversary)
    sampler = RandomSampler(data, replacement=True, num_samples=steps * batch)
    run = trainer("vqgan", 2 * steps)
    run.gradient_clip_val = None  # clipped above, each network by itself
    run.fit(module, DataLoader(data, batch, sampler=sampler, num_workers=workers), ckpt_path="last")
    module.vq.eval().to(torch.float16).save_pretrained(ROOT / "emoji_vqgan")
    print("saved", ROOT / "emoji_vqgan")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=8000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--adversary", type=float, default=0.02, help="weight of the discriminator's loss")
    parser.add_argument("--workers", type=int, default=0)
    main(**vars(parser.parse_args()))

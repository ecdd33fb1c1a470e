"""emoji_vqgan, a VQ-GAN of scenes of several objects: python experiments/openmoji/train_vqgan.py [--steps N]

It maps 64×64×3 images to 16×16 codes of 2,048 (Esser et al., 2021). It starts from emoji_unet's autoencoder, with a
codebook from k-means over its latents. The codebook then follows the encoder's outputs by moving averages (van den
Oord et al., 2017, appendix A). The loss is that of the autoencoder (train_vae.py), the commitment loss, and in the
last third of the steps the hinge loss of a patch discriminator, with a small weight because an emoji has little
texture. Codes that were not used in a hundred steps are moved to outputs of the encoder. If it is started again, it
continues from its last checkpoint.
"""

import argparse

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, VQModel
from rendered import ROOT, names_no_folder, rendered
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset
from train_vae import differences, opponents
from training import trainer

# B batch, C code width, K codes, h w grid of codes.
K, C = 2048, 4
SCENES = 0.7  # of the pictures; the others show one object, large
VAE = ROOT.parents[1] / "unlearning" / "weights" / "emoji_unet" / "vae"
DECAY, COMMITMENT = 0.99, 0.25


@torch.no_grad()
def begun(pictures: Tensor, init: str | None) -> VQModel:
    """A saved VQModel, or one from emoji_unet's autoencoder and k-means over latents of images (N, 64, 64, 3)."""
    vq = VQModel(
        block_out_channels=(32, 32, 64),
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
    own = VQModel.from_pretrained(init).float().state_dict() if init else _without_posterior()
    codebook = own.pop("quantize.embedding.weight", None)
    vq.load_state_dict(own, strict=False)
    if codebook is not None and len(codebook) == K:
        vq.quantize.embedding.weight.copy_(codebook)
        return vq
    latents = torch.cat([vq.encode(b.permute(0, 3, 1, 2).float() / 127.5 - 1).latents for b in pictures.split(64)])
    means = MiniBatchKMeans(K, batch_size=8192, n_init=1, random_state=0)
    means.fit(latents.permute(0, 2, 3, 1).reshape(-1, C).numpy())
    vq.quantize.embedding.weight.copy_(torch.from_numpy(means.cluster_centers_))
    return vq


def _without_posterior() -> dict[str, Tensor]:
    """The weights of emoji_unet's autoencoder, with its last convolution and the posterior's mean merged."""
    weights = AutoencoderKL.from_pretrained(VAE).float().state_dict()
    matrix, shift = weights.pop("quant_conv.weight")[:C, :, 0, 0], weights.pop("quant_conv.bias")[:C]
    for name in ("encoder.conv_out.weight", "encoder.conv_out.bias"):
        weights[name] = torch.einsum("oi,i...->o...", matrix, weights[name])
    weights["encoder.conv_out.bias"] += shift
    weights["quant_conv.weight"], weights["quant_conv.bias"] = torch.eye(C)[..., None, None], torch.zeros(C)
    return weights


def discriminator() -> nn.Sequential:
    """A patch discriminator: (B, 3, 64, 64) to (B, 1, 7, 7)."""

    def halve(channels_in: int, channels: int) -> list[nn.Module]:
        return [nn.Conv2d(channels_in, channels, 4, 2, 1), nn.GroupNorm(8, channels), nn.LeakyReLU(0.2)]

    return nn.Sequential(*halve(3, 32), *halve(32, 64), *halve(64, 128), nn.Conv2d(128, 1, 4, 1, 1))


class VQGAN(pl.LightningModule):
    def __init__(self, vq: VQModel, steps: int, lr: float, adversary: float):
        super().__init__()
        self.automatic_optimization = False
        self.steps, self.lr, self.weight = steps, lr, adversary
        self.vq, self.discriminator = vq, discriminator()
        vq.quantize.requires_grad_(False)
        self.register_buffer("idle", torch.zeros(K, dtype=torch.long))  # steps since a code was last used
        self.register_buffer("counts", torch.ones(K))
        self.register_buffer("sums", vq.quantize.embedding.weight.detach().clone())

    def training_step(self, batch, batch_idx):
        x = batch[0].permute(0, 3, 1, 2).float() / 127.5 - 1
        paint, judge = self.optimizers()
        h = self.vq.encode(x).latents.float()
        z, _, (_, _, codes) = self.vq.quantize(h)
        y = self.vq.decode(z, force_not_quantize=True).sample.float()
        pixels = F.l1_loss(y, x)
        edges = sum(F.l1_loss(a, b) for a, b in zip(differences(y), differences(x), strict=True))
        colours = F.l1_loss(F.avg_pool2d(opponents(y), 4), F.avg_pool2d(opponents(x), 4))
        commitment = COMMITMENT * F.mse_loss(h, z.detach())
        playing = self.global_step // 2 >= self.steps * 2 // 3  # Lightning counts the steps of both optimizers
        fooling = -self.discriminator(y).mean() if playing else pixels.new_zeros(())
        self._descend(paint, pixels + edges + 5 * colours + commitment + self.weight * fooling, self.vq)
        if playing:
            real, fake = self.discriminator(x), self.discriminator(y.detach())
            self._descend(judge, (F.relu(1 - real) + F.relu(1 + fake)).mean(), self.discriminator)
        else:
            judge.step()  # keeps the two counts, and the two schedules, together
        for schedule in self.lr_schedulers():
            schedule.step()
        self._follow(h.permute(0, 2, 3, 1).flatten(0, 2), codes)
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
    def _follow(self, outputs: Tensor, codes: Tensor) -> None:
        """Moves each code towards the mean of its encoder outputs (N, C), and unused codes to random outputs."""
        codebook, codes = self.vq.quantize.embedding.weight, codes.flatten()
        self.counts.lerp_(torch.bincount(codes, minlength=K).to(self.counts), 1 - DECAY)
        self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, codes, outputs), 1 - DECAY)
        codebook.copy_(self.sums / self.counts.clamp(min=1e-3)[:, None])
        self.idle += 1
        self.idle[codes.unique()] = 0
        if self.global_step % 200 < 2 and self.global_step // 2 < 0.8 * self.steps:
            idle = (self.idle >= 100).nonzero().flatten()
            codebook[idle] = self.sums[idle] = outputs[torch.randint(len(outputs), (len(idle),), device=codes.device)]
            self.counts[idle], self.idle[idle] = 1, 0

    def configure_optimizers(self):
        moving = [p for p in self.vq.parameters() if p.requires_grad]
        paint = torch.optim.AdamW(moving, self.lr, betas=(0.5, 0.99), weight_decay=1e-4)
        judge = torch.optim.AdamW(self.discriminator.parameters(), self.lr / 4, betas=(0.5, 0.99))
        lower = lambda i: max(0.01, min(1, (i + 1) / 200, 1 - i / self.steps))  # noqa: E731
        return [paint, judge], [torch.optim.lr_scheduler.LambdaLR(o, lower) for o in (paint, judge)]


def main(steps: int, batch: int, images: int, lr: float, adversary: float, workers: int, init: str | None) -> None:
    pl.seed_everything(0)
    torch.set_float32_matmul_precision("high")
    pictures = torch.from_numpy(rendered("train", images, seed=1, scenes=SCENES)[0])
    data, module = TensorDataset(pictures), VQGAN(begun(pictures[:1000], init), steps, lr, adversary)
    sampler = RandomSampler(data, replacement=True, num_samples=steps * batch)
    run = trainer("vqgan", 2 * steps)
    run.gradient_clip_val = None  # clipped above, each network by itself
    run.fit(module, DataLoader(data, batch, sampler=sampler, num_workers=workers), ckpt_path="last")
    module.vq.eval().to(torch.float16).save_pretrained(ROOT / "emoji_vqgan")
    names_no_folder(ROOT / "emoji_vqgan" / "config.json")
    print("saved", ROOT / "emoji_vqgan")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--adversary", type=float, default=0.02, help="weight of the discriminator's loss")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--init", help="the folder of a VQModel to begin from, in place of emoji_unet's autoencoder")
    main(**vars(parser.parse_args()))

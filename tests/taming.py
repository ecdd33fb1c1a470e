"""taming-transformers' VQModel and GumbelVQ (Esser et al., CVPR 2021), written anew from their description.

Module names are those of its state dicts, so that a random one stands for a published checkpoint.
"""

import torch
import torch.nn.functional as F
from torch import nn


def norm(channels):
    return nn.GroupNorm(32, channels, eps=1e-6)


def swish(x):
    return x * torch.sigmoid(x)


class Residual(nn.Module):
    def __init__(self, inside, outside):
        super().__init__()
        self.norm1, self.conv1 = norm(inside), nn.Conv2d(inside, outside, 3, padding=1)
        self.norm2, self.conv2 = norm(outside), nn.Conv2d(outside, outside, 3, padding=1)
        if inside != outside:
            self.nin_shortcut = nn.Conv2d(inside, outside, 1)

    def forward(self, x):
        h = self.conv2(swish(self.norm2(self.conv1(swish(self.norm1(x))))))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class SelfAttention(nn.Module):
    """One head over all places."""

    def __init__(self, channels):
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2) for f in (self.q, self.k, self.v))  # (B, C, places)
        weights = (q.transpose(1, 2) @ k * x.shape[1] ** -0.5).softmax(-1)  # (B, asking, asked)
        return x + self.proj_out((v @ weights.transpose(1, 2)).view_as(x))


class Level(nn.Module):
    def __init__(self, inside, outside, blocks, attends):
        super().__init__()
        self.block = nn.ModuleList(Residual(inside if i == 0 else outside, outside) for i in range(blocks))
        self.attn = nn.ModuleList(SelfAttention(outside) for _ in range(blocks if attends else 0))

    def forward(self, x):
        for i, block in enumerate(self.block):
            x = block(x)
            x = self.attn[i](x) if len(self.attn) else x
        return x


class Resampling(nn.Module):
    def __init__(self, channels, stride):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride, padding=2 - stride)


class Middle(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.block_1, self.attn_1 = Residual(channels, channels), SelfAttention(channels)
        self.block_2 = Residual(channels, channels)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    def __init__(self, ch, mult, blocks, attention, resolution, z):
        super().__init__()
        widths = [ch, *(ch * m for m in mult)]
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i in range(len(mult)):
            level = Level(widths[i], widths[i + 1], blocks, resolution // 2**i in attention)
            if i < len(mult) - 1:
                level.downsample = Resampling(widths[i + 1], stride=2)
            self.down.append(level)
        self.mid = Middle(widths[-1])
        self.norm_out, self.conv_out = norm(widths[-1]), nn.Conv2d(widths[-1], z, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
            if hasattr(level, "downsample"):
                x = level.downsample.conv(F.pad(x, (0, 1, 0, 1)))  # below and on the right only
        return self.conv_out(swish(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    def __init__(self, ch, mult, blocks, attention, resolution, z):
        super().__init__()
        widths = [ch * m for m in mult]
        self.conv_in, self.mid = nn.Conv2d(z, widths[-1], 3, padding=1), Middle(widths[-1])
        self.up = nn.ModuleList()
        for i, width in enumerate(widths):
            below = widths[min(i + 1, len(widths) - 1)]
            level = Level(below, width, blocks + 1, resolution // 2**i in attention)
            if i > 0:
                level.upsample = Resampling(width, stride=1)
            self.up.append(level)
        self.norm_out, self.conv_out = norm(widths[0]), nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z):
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
            if hasattr(level, "upsample"):
                x = level.upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return self.conv_out(swish(self.norm_out(x)))


class Gumbel(nn.Module):
    """Codes by the largest logit, where taming draws one by Gumbel noise."""

    def __init__(self, z, width, codes):
        super().__init__()
        self.proj, self.embed = nn.Conv2d(z, codes, 1), nn.Embedding(codes, width)

    def codes(self, h):
        return self.proj(h).argmax(1)

    def forward(self, codes):
        return self.embed(codes).permute(0, 3, 1, 2)


class Nearest(nn.Module):
    def __init__(self, z, width, codes):
        super().__init__()
        self.embedding = nn.Embedding(codes, width)

    def codes(self, h):
        return (h[:, None] - self.embedding.weight[None, :, :, None, None]).square().sum(2).argmin(1)

    def forward(self, codes):
        return self.embedding(codes).permute(0, 3, 1, 2)


class VQGAN(nn.Module):
    """By default vqgan_gumbel_f8: 256 x 256 images as 32 x 32 codes from a codebook of 8192."""

    def __init__(
        self, quantizer=Gumbel, *, ch=128, mult=(1, 1, 2, 4), blocks=2, attention=(32,), resolution=256,
        z=256, width=256, codes=8192,
    ):  # fmt: skip
        super().__init__()
        sizes = (ch, mult, blocks, attention, resolution, z)
        self.encoder, self.decoder = Encoder(*sizes), Decoder(*sizes)
        self.quantize = quantizer(z, width, codes)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(z, width, 1), nn.Conv2d(width, z, 1)

    def codes(self, pictures):
        """Images (B, 3, H, W) in [-1, 1] to codes (B, h, w)."""
        return self.quantize.codes(self.quant_conv(self.encoder(pictures)))

    def decode(self, codes):
        return self.decoder(self.post_quant_conv(self.quantize(codes)))

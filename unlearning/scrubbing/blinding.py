"""What replaces the concept in the teacher's image: z_blind = (1 - M) z_0 + M eta  (eq. 8).

- gaussian: eta ~ N(0, I), drawn at every step; the write-up's.
- shuffled: patches of the background in random order.
- inpaint: what the teacher generates there, given the background.
"""

# N images, C H W latent shape, M masks (N, 1, H, W).
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from unlearning.errors import unknown
from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel, at_once
from unlearning.models.guidance import Guidance, Scale, Walk
from unlearning.sampling.sampler import denoise

Blinding = Literal["gaussian", "shuffled", "inpaint"]
PER_CALL, STEPS = 16, 20  # images in one call of the teacher; steps of inpainting


@dataclass(frozen=True)
class Inpaint(Guidance):
    """Guidance that keeps the known part of an image: where M is 0, the implied x_0 is replaced by z_0.

    Args:
        z_0: The image's latent, (N, C, H, W).
        M: 1 where the image is generated, (N, 1, H, W).
    """

    z_0: Tensor
    M: Tensor

    def begin(self, model: DiffusionModel, c: Conditioning, scale: Scale) -> Walk:
        def predict(x_t: Tensor, t: Tensor, c: Conditioning, step: int) -> Tensor:
            t = t.expand(len(x_t))
            x_0 = model.to_x0(model.predict(x_t, t, c), x_t, t)
            return model.to_prediction(self.M * x_0 + (1 - self.M) * self.z_0, x_t, t)

        return Walk(c, predict)


@torch.no_grad()
def replacement(kind: Blinding, teacher: DiffusionModel, z_0: Tensor, M: Tensor) -> Tensor:
    """eta (N, C, H, W) for latents z_0 (N, C, H, W).

    Raises:
        UserError: For an unknown kind.
    """
    match kind:
        case "gaussian":
            return torch.randn_like(z_0)
        case "shuffled":
            return shuffled(z_0, M)
        case "inpaint":
            few = at_once(z_0, PER_CALL)
            pairs = zip(z_0.split(few), M.split(few), strict=True)
            return torch.cat([inpainted(teacher, z, m) for z, m in pairs])
    raise unknown("blinding", kind, get_args(Blinding))


def shuffled(z_0: Tensor, M: Tensor) -> Tensor:
    """Random patches with an eighth of the side; the more background a patch has, the more often it is drawn."""
    H, W = z_0.shape[-2:]
    size = max(1, min(H, W) // 8)
    pixels = torch.arange(H * W, device=z_0.device).reshape(H, W).unfold(0, size, 1).unfold(1, size, 1)  # of each patch
    background = F.avg_pool2d(1 - M, size, stride=1).flatten(1).pow(4) + 1e-6
    down, across = -(-H // size), -(-W // size)
    chosen = torch.multinomial(background, down * across, replacement=True).unflatten(1, (down, across))
    tiled = pixels[chosen // pixels.shape[1], chosen % pixels.shape[1]].transpose(2, 3)  # (N, down, size, across, size)
    values = z_0.flatten(2).gather(2, tiled.flatten(1)[:, None].expand(-1, z_0.shape[1], -1))
    return values.unflatten(2, (down * size, across * size))[..., :H, :W]


def inpainted(teacher: DiffusionModel, z_0: Tensor, M: Tensor) -> Tensor:
    """What the teacher generates with the null prompt, given the background."""
    c, noise = teacher.encode_prompts([""]).expand(len(z_0)), torch.randn_like(z_0)
    path = denoise(teacher, noise, Inpaint(z_0, M).begin(teacher, c, 1.0), steps=STEPS)
    for _, x in path:  # noqa: B007 (the last x is the image)
        pass
    return x

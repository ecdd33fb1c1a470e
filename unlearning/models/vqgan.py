"""VQ-GANs: pictures to grids of codes and back. diffusers' VQModel, and taming-transformers' checkpoints."""

# B batch, H W height and width, h w grid of codes, K codes, C their width.
import copy
from collections.abc import Callable
from pathlib import Path
from types import MethodType

import torch
from diffusers import VQModel
from safetensors import SafetensorError
from torch import Tensor, nn

from unlearning.errors import UserError
from unlearning.models import taming
from unlearning.models.base import DType, Model, chosen_device, fingerprint

# More than rounding moves what is compared: of the picture's longest latent, squared; of its largest logit.
TIE_OF_DISTANCES, TIE_OF_LOGITS = 1e-7, 1e-5


class VQGAN(Model):
    """
    A code is the nearest vector of the codebook, or, where the quantizer was trained by Gumbel's softmax, the argmax of
    its logits: the same picture always has the same codes. (The reference samples them.)

    Attributes:
        codebook: (K, C).
        grid: (h, w) of one picture.
        size: The pictures' side in pixels.
        edit: Replaces codes before they are decoded, see CodebookEdit; None for the unedited model.
    """

    component = "vqvae"
    edit: Callable | None = None

    def __init__(
        self, vq: VQModel, *, logits: nn.Module | None = None, name: str, fingerprint: str, device: torch.device
    ):
        self.vq, self.logits = vq.requires_grad_(False).eval(), logits and logits.requires_grad_(False).eval()
        self.parts = {self.component: self.vq}
        self.encoder = vq.encoder  # load() puts a quicker one beside it, where there is one
        self.name, self.fingerprint, self.dtype, self._device = name, fingerprint, vq.dtype, device

    @classmethod
    def load(
        cls, path: str, *, dtype: DType = "float32", autocast: DType | None = None, device: str = "auto"
    ) -> "VQGAN":
        """Loads a folder that VQModel.save_pretrained wrote, or a checkpoint of taming-transformers.

        Args:
            dtype: Of the weights: float32, bfloat16 or float16.
            autocast: What the networks compute in, where it is not the weights' dtype. Half precision changes codes.
            device: "auto" takes the accelerator where there is one.

        Raises:
            UserError: Where there is neither, or it cannot be read.
        """
        place, folder, dtype = chosen_device(device), Path(path), getattr(torch, dtype)
        if folder.is_dir():
            try:
                vq, logits = VQModel.from_pretrained(folder, dtype=dtype, use_safetensors=True), None
            except (OSError, ValueError, RuntimeError, SafetensorError) as error:
                raise UserError(f"No VQModel could be loaded from {path}: {error}") from error
        else:
            vq, logits = taming.load(folder)
        vq = vq.to(place) if vq.dtype == dtype else vq.to(place, dtype)
        logits = logits and logits.to(place, dtype)
        model = cls(vq, logits=logits, name=str(path), fingerprint=fingerprint(folder), device=place)
        if place.type == "cpu":
            model.encoder = _channels_last(copy.deepcopy(vq.encoder))
            _channels_last(vq.decoder)
            torch.empty(31 * 2**20, dtype=torch.uint8)  # freed at once: from then on glibc keeps what layers free
        model.autocast = getattr(torch, autocast) if autocast else None
        return model

    @property
    def codebook(self) -> Tensor:
        return self.vq.quantize.embedding.weight

    @property
    def size(self) -> int:
        return self.vq.config.sample_size

    @property
    def grid(self) -> tuple[int, int]:
        side = self.size // 2 ** (len(self.vq.config.block_out_channels) - 1)
        return side, side

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes (B, h, w) of pictures (B, 3, H, W) in [0, 1]; of float32 on a CPU, in whatever batch, diffusers' own.

        Raises:
            UserError: Where the pictures are smaller than what one code stands for.
        """
        if min(images.shape[-2:]) < (cell := self.size // self.grid[0]):
            raise UserError(
                f"A code of {self.name} stands for {cell} by {cell} pixels, and these pictures have "
                f"{images.shape[-2]} by {images.shape[-1]}: dataset.size={self.size}."
            )
        found = [self._search(values) for values in self._values(images, self.encoder)]
        codes = torch.stack([nearest for nearest, _ in found])
        for i, (_, tied) in enumerate(found):
            if tied:
                codes[i] = self._diffusers_search(self._values(images[i : i + 1].contiguous(), self.vq.encoder)[0])
        return codes

    def _values(self, images: Tensor, encoder: nn.Module) -> Tensor:
        """What codes are chosen by, (B, h, w, C), or (B, h, w, K) where they are logits."""
        with self.precision():
            z = self.vq.quant_conv(encoder((2 * images - 1).to(self.device, self.dtype)))
            return (self.logits(z) if self.logits else z).float().permute(0, 2, 3, 1)

    def _search(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (h, w) of one picture's values, and whether for any a second is as near but for rounding."""
        flat = values.flatten(0, 1)
        if self.logits:
            far, tie = -flat, TIE_OF_LOGITS * flat.abs().max()
        else:  # |c|² - 2 z·c, the distance squared but for |z|²: one product instead of cdist's two passes
            codebook = self.codebook.float()
            far = torch.addmm(codebook.square().sum(1), flat, codebook.T, alpha=-2)
            tie = TIE_OF_DISTANCES * flat.square().sum(1).max()
        nearest, codes = far.min(1)
        second = far.scatter_(1, codes[:, None], torch.inf).amin(1)
        return codes.view(values.shape[:2]), (second <= nearest + tie).any()

    def _diffusers_search(self, values: Tensor) -> Tensor:
        """Codes (h, w) of one picture's values, as diffusers' VectorQuantizer finds them."""
        if self.logits:
            return values.argmax(2)
        return torch.cdist(values.flatten(0, 1).contiguous(), self.codebook.float()).argmin(1).view(values.shape[:2])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [0, 1]."""
        z = self.codebook[codes.to(self.device)].permute(0, 3, 1, 2)
        with self.precision():
            return (self.vq.decode(z, force_not_quantize=True).sample.float() / 2 + 0.5).clamp(0, 1)


def _channels_last(network: nn.Module) -> nn.Module:
    """In the memory format that a CPU's convolutions are faster in."""
    for norm in (module for module in network.modules() if isinstance(module, nn.GroupNorm)):
        norm.forward = MethodType(_group_norm, norm)
    return network.to(memory_format=torch.channels_last)


def _group_norm(self: nn.GroupNorm, x: Tensor) -> Tensor:
    """Of pictures (B, C, H, W) whose channels lie together.

    PyTorch's own takes the variance of those as E[x²] - E[x]² on a CPU: it rounds more coarsely for it, and codes would
    change.
    """
    if x.ndim != 4:
        return nn.GroupNorm.forward(self, x)

    def mean(of: Tensor) -> Tensor:  # of each channel's group, (B, C, 1, 1)
        groups = of.mean((2, 3)).unflatten(1, (self.num_groups, -1)).mean(2)
        return groups.repeat_interleave(x.shape[1] // self.num_groups, 1)[..., None, None]

    x = x - mean(x)
    scale = (mean(x.square()) + self.eps).rsqrt() * self.weight[:, None, None]
    return torch.addcmul(self.bias[:, None, None], x, scale)

"""VQ-GANs: from images to grids of codes and back. Loads diffusers' VQModel and checkpoints of taming-transformers."""

# B batch, H W height and width, h w grid of codes, K codes, C their width.
import copy
from collections.abc import Callable
from pathlib import Path
from types import MethodType

import torch
from diffusers import VQModel
from safetensors import SafetensorError
from torch import Tensor, nn

from unlearning.config.precision import chosen_autocast, warn_if_slow
from unlearning.errors import UserError
from unlearning.models import taming
from unlearning.models.base import Autocast, DType, Model, chosen_device
from unlearning.models.folders import fingerprint, load_complete

# Two codes whose values differ by less are a tie, because rounding can swap them. In units of the squared length of an
# image's longest latent, and of its largest logit.
TIE_OF_DISTANCES, TIE_OF_LOGITS = 1e-7, 1e-5


class VQGAN(Model):
    """An image-to-image model that encodes an image as a grid of codes and decodes it.

    A code is the nearest vector of the codebook, or the argmax of logits if the quantizer was trained with
    Gumbel-softmax. An image always has the same codes; taming-transformers samples the latter.

    Attributes:
        codebook: (K, C).
        grid: (h, w) of one image.
        size: The images' side in pixels.
        edit: Replaces codes before they are decoded, see codes/erasure.py; None for the unedited model.
    """

    component = "vqvae"
    edit: Callable | None = None

    def __init__(
        self, vq: VQModel, *, logits: nn.Module | None = None, name: str, fingerprint: str, device: torch.device
    ):
        self.vq, self.logits = vq.requires_grad_(False).eval(), logits and logits.requires_grad_(False).eval()
        self.parts = {self.component: self.vq}
        self.encoder = vq.encoder  # load() replaces it on a CPU by a faster one
        self.name, self.fingerprint, self.dtype, self._device = name, fingerprint, vq.dtype, device

    @classmethod
    def load(cls, path: str, *, dtype: DType = "float32", autocast: Autocast = None, device: str = "auto") -> "VQGAN":
        """Loads a folder that VQModel.save_pretrained wrote, or a checkpoint of taming-transformers.

        Args:
            path: The folder or the file.
            dtype: The weights' dtype: float32, bfloat16 or float16.
            autocast: The dtype of the networks' computations, if it is another one; "auto" is bfloat16 on hardware that
                is fast in it. Half precision changes codes.
            device: "auto" is the accelerator if there is one.

        Raises:
            UserError: If there is no model at `path`, or it cannot be read.
        """
        target, folder, kept = chosen_device(device), Path(path).expanduser(), getattr(torch, dtype)
        warn_if_slow(autocast := chosen_autocast(autocast, dtype, device), target.type)
        if folder.is_dir():
            try:
                vq, logits = load_complete(VQModel, folder, dtype=kept, use_safetensors=True), None
            except (OSError, ValueError, RuntimeError, SafetensorError) as error:
                raise UserError(f"No VQModel could be loaded from {path}: {error}") from error
        else:
            vq, logits = taming.load(folder)
        vq = vq.to(target) if vq.dtype == kept else vq.to(target, kept)
        logits = logits and logits.to(target, kept)
        model = cls(vq, logits=logits, name=str(path), fingerprint=fingerprint(folder), device=target)
        if target.type == "cpu":
            model.encoder = _channels_last(copy.deepcopy(vq.encoder))
            _channels_last(vq.decoder)
            torch.empty(31 * 2**20, dtype=torch.uint8)  # freed at once; glibc then reuses the memory that layers free
        model.autocast = getattr(torch, autocast) if autocast else None
        return model

    @property
    def codebook(self) -> Tensor:
        """The vectors of the codes, (K, C)."""
        return self.vq.quantize.embedding.weight

    @property
    def size(self) -> int:
        """The images' side in pixels."""
        return self.vq.config.sample_size

    @property
    def grid(self) -> tuple[int, int]:
        """The grid (h, w) of one image's codes."""
        side = self.size // 2 ** (len(self.vq.config.block_out_channels) - 1)
        return side, side

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Codes (B, h, w) of images (B, 3, H, W) in [0, 1]. In float32 on a CPU they equal diffusers', for any batch.

        Raises:
            UserError: If the images are smaller than the cell of one code, or the encoder's values are not finite.
        """
        if min(images.shape[-2:]) < (cell := self.size // self.grid[0]):
            raise UserError(
                f"A code of {self.name} covers {cell} × {cell} pixels, but these images have {images.shape[-2]} × "
                f"{images.shape[-1]}: dataset.size={self.size}."
            )
        results = [self._search(values) for values in self._values(images, self.encoder)]
        codes = torch.stack([nearest for nearest, _ in results])
        for i, (_, tied) in enumerate(results):
            if tied:  # decided as diffusers does, on the image alone
                codes[i] = self._diffusers_search(self._values(images[i : i + 1].contiguous(), self.vq.encoder)[0])
        return codes

    def _values(self, images: Tensor, encoder: nn.Module) -> Tensor:
        """The values that decide the codes: latents (B, h, w, C), or logits (B, h, w, K)."""
        with self.precision():
            z = self.vq.quant_conv(encoder((2 * images - 1).to(self.device, self.dtype)))
            return (self.logits(z) if self.logits else z).float().permute(0, 2, 3, 1)

    def _search(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The codes (h, w) for the values of one image, and whether any of them is a tie."""
        flat = values.flatten(0, 1)
        if self.logits:
            far, tie = -flat, TIE_OF_LOGITS * flat.abs().max()
        else:  # |c|² - 2 z·c is the squared distance less |z|²: one matrix product, where cdist needs two passes
            codebook = self.codebook.float()
            far = torch.addmm(codebook.square().sum(1), flat, codebook.T, alpha=-2)
            tie = TIE_OF_DISTANCES * flat.square().sum(1).max()
        nearest, codes = far.min(1)
        if not nearest.isfinite().all():  # the argmin of NaN is a code like any other
            raise UserError(
                f"The encoder of {self.name} gives values that are not finite. In float16 and bfloat16, "
                "model.dtype=float32 model.autocast=null helps; in float32 the weights are damaged."
            )
        second = far.scatter_(1, codes[:, None], torch.inf).amin(1)
        return codes.view(values.shape[:2]), (second <= nearest + tie).any()

    def _diffusers_search(self, values: Tensor) -> Tensor:
        """The codes (h, w) for the values of one image, by the operations of diffusers' VectorQuantizer."""
        if self.logits:
            return values.argmax(2)
        return torch.cdist(values.flatten(0, 1).contiguous(), self.codebook.float()).argmin(1).view(values.shape[:2])

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of codes (B, h, w)."""
        z = self.codebook[codes.to(self.device)].permute(0, 3, 1, 2)
        with self.precision():
            return (self.vq.decode(z, force_not_quantize=True).sample.float() / 2 + 0.5).clamp(0, 1)


def _channels_last(network: nn.Module) -> nn.Module:
    """Converts a network to the memory format in which convolutions are faster on a CPU."""
    for norm in (module for module in network.modules() if isinstance(module, nn.GroupNorm)):
        norm.forward = MethodType(_group_norm, norm)  # type: ignore[method-assign]
    return network.to(memory_format=torch.channels_last)


def _group_norm(self: nn.GroupNorm, x: Tensor) -> Tensor:
    """Group norm of x (B, C, H, W) in the channels-last format.

    On a CPU, PyTorch computes the variance in this format as E[x²] - E[x]², whose rounding errors change codes.
    """
    if x.ndim != 4:
        return nn.GroupNorm.forward(self, x)

    def mean(values: Tensor) -> Tensor:  # over the group of each channel, (B, C, 1, 1)
        groups = values.mean((2, 3)).unflatten(1, (self.num_groups, -1)).mean(2)
        return groups.repeat_interleave(x.shape[1] // self.num_groups, 1)[..., None, None]

    x = x - mean(x)
    scale = (mean(x.square()) + self.eps).rsqrt() * self.weight[:, None, None]
    return torch.addcmul(self.bias[:, None, None], x, scale)

"""Latents with noise, and the loss of every diffusion model."""

# B batch, C H W latent shape.
import torch
import torch.nn.functional as F
from torch import Tensor

from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel


def noised(model: DiffusionModel, x_0: Tensor) -> tuple[Tensor, Tensor]:
    """(x_t, t) of latents (B, C, H, W), at timesteps (B,) drawn uniformly."""
    t = model.timesteps(torch.rand(len(x_0)))
    return model.add_noise(x_0, torch.randn_like(x_0), t), t


def denoising_loss(model: DiffusionModel, x_0: Tensor, x_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
    """|| eps - eps_theta(x_t, t, c) ||^2, (), or the same of v or flow (Ho et al., 2020, arXiv:2006.11239, eq. 14).

    Args:
        x_0, x_t, t: Latents (B, C, H, W), the same with noise, and their timesteps (B,).
    """
    return F.mse_loss(model.predict(x_t, t, c), model.to_prediction(x_0, x_t, t))

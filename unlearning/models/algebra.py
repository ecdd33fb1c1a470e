"""The algebra of diffusion: what noise does to latents, and what a prediction of eps, of v or of a flow implies.

x_t = alpha_t x_0 + sigma_t eps
"""

# B batch, C latent channels, H W latent height and width.
from abc import abstractmethod
from collections.abc import Sequence

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from unlearning.models.base import Model


class DiffusionAlgebra(Model):
    """A model of latents with noise, and maps between latents, noise and its predictions.

    Attributes:
        scheduler: The noise schedule it was trained with.
    """

    scheduler: SchedulerMixin

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the latents of one image."""

    def noise(self, seeds: Sequence[int]) -> Tensor:
        """Standard normal latents (B, C, H, W), each from its own seed: no batch size or device changes an image."""
        each = [torch.randn(self.latent_shape, generator=torch.Generator().manual_seed(s)) for s in seeds]
        return torch.stack(each).to(self.device)

    @property
    def prediction_type(self) -> str:
        """ "epsilon", "v_prediction" or "flow": what the denoiser's output means."""
        meaning = self.scheduler.config.get("prediction_type", "flow")
        return "flow" if meaning == "flow_prediction" else meaning

    def _alpha_sigma(self, t: Tensor) -> tuple[Tensor, Tensor]:
        t = t.reshape(-1, 1, 1, 1).to(self.device)
        if self.prediction_type == "flow":
            sigma = t / self.scheduler.config.num_train_timesteps
            return 1 - sigma, sigma
        alpha_bar = self.scheduler.alphas_cumprod.to(self.device)[t]
        return alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def add_noise(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t eps; t is (B,)."""
        alpha, sigma = self._alpha_sigma(t)
        return alpha * x_0 + sigma * eps

    def to_x0(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The image that a prediction implies: of eps (x_t - sigma eps) / alpha, of v alpha x_t - sigma v.

        For a flow, which predicts eps - x_0, it is x_t - sigma (eps - x_0).
        """
        alpha, sigma = self._alpha_sigma(t)
        if self.prediction_type == "flow":
            return x_t - sigma * prediction
        if self.prediction_type == "v_prediction":
            return alpha * x_t - sigma * prediction
        return (x_t - sigma * prediction) / alpha

    def to_eps(self, prediction: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The noise that a prediction implies: (x_t - alpha x_0) / sigma."""
        alpha, sigma = self._alpha_sigma(t)
        return (x_t - alpha * self.to_x0(prediction, x_t, t)) / sigma

    def to_prediction(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The prediction that implies the image x_0: the inverse of `to_x0`."""
        alpha, sigma = self._alpha_sigma(t)
        if self.prediction_type == "v_prediction":
            return (alpha * x_t - x_0) / sigma
        return (x_t - (x_0 if self.prediction_type == "flow" else alpha * x_0)) / sigma

    def x0_gain(self, t: Tensor) -> Tensor:
        """The error of the implied image over the error of the prediction, (B, 1, 1, 1)."""
        alpha, sigma = self._alpha_sigma(t)
        return sigma / alpha if self.prediction_type == "epsilon" else sigma

    def snr(self, t: Tensor) -> Tensor:
        """alpha_t² / sigma_t², (B, 1, 1, 1)."""
        alpha, sigma = self._alpha_sigma(t)
        return (alpha / sigma).square()

    def timesteps(self, share: Tensor) -> Tensor:
        """The timesteps at `share` (B,) in [0, 1) of the schedule: integers, but real numbers for a flow."""
        t = share.to(self.device) * self.scheduler.config.num_train_timesteps
        return t.clamp(min=1) if self.prediction_type == "flow" else t.long()

    def step_at(self, t: Tensor, steps: int) -> Tensor:
        """The sampling step, from 0, at which a trajectory of `steps` steps is at t; t of any shape."""
        return ((1 - t / self.scheduler.config.num_train_timesteps) * steps).long()

"""Noisy latents, and the loss of the noise prediction."""

import pytest
import torch
import torch.nn.functional as F

from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.denoising import denoising_loss, noised


@pytest.fixture
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


def test_noise_is_standard_normal_at_timesteps_of_the_whole_schedule(model):
    torch.manual_seed(0)
    x_0 = torch.randn(8, *model.latent_shape)
    x_t, t = noised(model, x_0)
    assert t.shape == (8,) and len(t.unique()) > 1
    eps = model.to_eps(model.to_prediction(x_0, x_t, t), x_t, t)
    torch.testing.assert_close(model.add_noise(x_0, eps, t), x_t, atol=1e-4, rtol=0)
    assert eps.std() == pytest.approx(1, abs=0.15)


@torch.no_grad()
def test_the_loss_is_the_error_of_the_noise(model):
    torch.manual_seed(0)
    x_0, eps, t = torch.randn(2, *model.latent_shape), torch.randn(2, *model.latent_shape), torch.tensor([200, 800])
    x_t, c = model.add_noise(x_0, eps, t), model.encode_prompts(["a cat", "a dog"])
    error = F.mse_loss(model.predict(x_t, t, c), eps)
    torch.testing.assert_close(denoising_loss(model, x_0, x_t, t, c), error, atol=1e-5, rtol=1e-4)

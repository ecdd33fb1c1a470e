"""Blinding: the replacements for the concept depend on the background only."""

from typing import get_args

import pytest
import torch
from diffusers import DDIMScheduler

from tests.tiny import FAMILIES
from unlearning.errors import UserError
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.scrubbing.blinding import Blinding, inpainted, replacement, shuffled


@pytest.fixture(scope="module")
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


@pytest.fixture
def hole():
    """(z_0, M): a concept of value 100 in a background of ones."""
    z_0, M = torch.ones(2, 4, 8, 8), torch.zeros(2, 1, 8, 8)
    M[:, :, 2:5, 2:5] = 1
    return torch.where(M > 0, 100.0, z_0), M


@pytest.mark.parametrize("kind", get_args(Blinding))
def test_a_replacement_does_not_depend_on_the_concept(model, hole, kind):
    z_0, M = hole
    etas = []
    for concept in (z_0, -z_0):
        torch.manual_seed(0)
        etas.append(replacement(kind, model, torch.where(M > 0, concept, z_0), M))
    assert etas[0].shape == z_0.shape and etas[0].isfinite().all()
    torch.testing.assert_close(M * etas[0], M * etas[1], atol=0.1, rtol=0)


def test_shuffled_consists_of_patches_of_the_background(hole):
    torch.manual_seed(0)
    assert (shuffled(*hole) == 1).all()
    z_0 = torch.arange(2 * 16 * 20.0).reshape(1, 2, 16, 20)
    drawn = shuffled(z_0, torch.zeros(1, 1, 16, 20))
    first = drawn[:, :, ::2, ::2]  # patches are two by two
    for down, right in ((0, 1), (1, 0), (1, 1)):
        assert torch.equal(drawn[:, :, down::2, right::2], first + 20 * down + right)
    assert torch.equal(first[:, 1], first[:, 0] + 320) and not torch.equal(drawn, z_0)


def test_inpainting_keeps_the_background_and_changes_the_rest(model, hole):
    torch.manual_seed(0)
    z_0, M = hole
    x = inpainted(model, z_0, M)
    torch.testing.assert_close((1 - M) * x, (1 - M) * z_0, atol=0.2, rtol=0)  # the last step leaves a little noise
    assert not torch.allclose(M * x, M * z_0, atol=1.0)


def test_inpainting_keeps_the_background_in_every_family(any_pipeline, monkeypatch):
    """DDIM stops slightly before x_0, and DPM-Solver rounds the timesteps of a flow, hence the tolerances."""
    family, folder = any_pipeline
    model = FAMILIES[family].load(str(folder), device="cpu")
    monkeypatch.setattr("unlearning.scrubbing.blinding.STEPS", 4)
    torch.manual_seed(0)
    z_0, M = torch.randn(2, *model.latent_shape), torch.zeros(2, 1, *model.latent_shape[1:])
    M[..., :4] = 1
    x, short = replacement("inpaint", model, z_0, M), 0.15 if model.solver is DDIMScheduler else 0.01
    torch.testing.assert_close((1 - M) * x, (1 - M) * z_0, atol=short, rtol=0)
    assert x.isfinite().all() and (M * (x - z_0)).abs().max() > 0.5


def test_an_unknown_blinding_lists_the_known_ones(model, hole):
    with pytest.raises(UserError, match="shuffled"):
        replacement("black", model, *hole)

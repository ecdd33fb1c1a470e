"""Features specific to Flux: packed latents, and a guidance scale as an input of the denoiser."""

import pytest
import torch
from diffusers import FluxPipeline

from tests import tiny
from unlearning.models.flux import Flux
from unlearning.sampling.sampler import Sampler


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(tiny.save("flux", tmp_path_factory.mktemp("models")))


@pytest.fixture(scope="module")
def model(folder):
    return Flux.load(folder, device="cpu")


def test_latents_are_packed_as_diffusers_packs(model):
    x_t, c = torch.randn(2, 4, 6, 8), model.encode_prompts(["a cat", ""])
    (tokens,), inputs = model._denoiser_inputs(x_t, torch.tensor(250), c)
    torch.testing.assert_close(tokens, FluxPipeline._pack_latents(x_t, 2, 4, 6, 8))
    torch.testing.assert_close(inputs["img_ids"], FluxPipeline._prepare_latent_image_ids(2, 3, 4, "cpu", torch.float32))
    torch.testing.assert_close(model._unpacked(tokens, x_t.shape), x_t)
    assert inputs["timestep"].tolist() == [0.25, 0.25]


@pytest.mark.parametrize("scale", [1.0, 3.5])
def test_the_embedded_guidance_is_the_pipelines_guidance_scale(folder, scale):
    model = Flux.load(folder, device="cpu", embedded_guidance=scale)
    ours = Sampler(steps=3, guidance_scale=1.0)(model, ["a cat"], [0])
    theirs = model.pipeline(
        "a cat", num_inference_steps=3, guidance_scale=scale, generator=torch.Generator().manual_seed(0),
        output_type="pt", height=16, width=16,
    ).images  # fmt: skip
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_images_of_one_embedded_guidance_are_not_those_of_another(model, folder):
    other = Flux.load(folder, device="cpu", embedded_guidance=1.0)
    assert model.numerics != other.numerics
    assert not torch.allclose(*(Sampler(steps=3, guidance_scale=1.0)(m, ["a cat"], [0]) for m in (model, other)))

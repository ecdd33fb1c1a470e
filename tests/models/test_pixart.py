"""Features specific to PixArt: alpha has the image size as an input, and diffusers supports no adapters."""

import torch
from diffusers import DDIMScheduler, PixArtAlphaPipeline

from tests import tiny
from unlearning.models.pixart import PixArt
from unlearning.sampling.guidance import begin
from unlearning.sampling.sampler import Sampler, denoise


def test_alpha_takes_the_images_size_as_an_input(tmp_path):
    torch.manual_seed(0)
    tiny.pixart(PixArtAlphaPipeline, sample_size=128).save_pretrained(tmp_path)  # the size that it takes as an input
    model = PixArt.load(str(tmp_path), device="cpu")
    assert isinstance(model.pipeline, PixArtAlphaPipeline)
    assert model.encode_prompts(["a cat", ""]).extra["resolution"].tolist() == [[256, 256]] * 2
    ours = Sampler(steps=2, guidance_scale=4.5)(model, ["a cat"], [0])
    theirs = model.pipeline(
        "a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), height=256, width=256,
        output_type="pt", **tiny.LIKE_OURS,
    ).images  # fmt: skip
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_ddim_does_not_clip_the_latents(tmp_path):
    model = PixArt.load(str(tiny.save("pixart", tmp_path)), device="cpu")
    noise, c = 9 * torch.ones(1, *model.latent_shape), model.encode_prompts([""])
    *_, (_, x_0) = denoise(model, noise, begin(model, c, 1.0), steps=2, scheduler=DDIMScheduler)
    assert x_0.abs().max() > 1, "the config of PixArt's own solver does not say that there is nothing to clip"

import pytest
import torch

from unlearning.concepts import Concept, UnlearningTask
from unlearning.errors import UserError
from unlearning.methods.negative_prompt import NegativePrompting
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.attack_result import Restored
from unlearning.sampling.sampler import Sampler


def test_it_is_diffusers_negative_prompt(sd1):
    model = StableDiffusion.load(str(sd1), device="cpu")
    erasure = NegativePrompting().fit(model, UnlearningTask(erase=(Concept("cat"), Concept("dog"))))
    with erasure.applied_to(model):
        ours = Sampler(steps=3)(model, ["a bird"], [1])
    theirs = model.pipeline("a bird", negative_prompt="cat, dog", num_inference_steps=3, output_type="pt",
                            generator=torch.Generator().manual_seed(1)).images  # fmt: skip
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_a_guidance_scale_that_leaves_the_null_branch_out_is_refused(sd1):
    model = StableDiffusion.load(str(sd1), device="cpu")
    with NegativePrompting().fit(model, UnlearningTask(erase=(Concept("cat"),))).applied_to(model):
        with pytest.raises(UserError, match=r"sampler\.guidance_scale"):
            Sampler(steps=1, guidance_scale=1)(model, ["a bird"], [1])
        with pytest.raises(UserError, match=r"sampler\.guidance_scale"):
            Sampler(steps=1).sample(model, Restored(["a bird", "a fish"], model.noise([1, 2])), [7.5, 1.0])


def test_it_is_refused_before_the_base_model_generates(error_of, tmp_path):
    said = error_of("dataset=prompt", "method=negative_prompt", "sampler.guidance_scale=1")
    assert "sampler.guidance_scale" in said and not list(tmp_path.rglob("*.png"))

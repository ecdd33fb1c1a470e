import torch

from unlearning.concepts import Concept, UnlearningTask
from unlearning.methods.negative_prompt import NegativePrompting
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.sampler import Sampler


def test_it_is_diffusers_negative_prompt(sd1):
    model = StableDiffusion.load(str(sd1), device="cpu")
    erasure = NegativePrompting().fit(model, UnlearningTask(erase=(Concept("cat"), Concept("dog"))))
    with erasure.applied_to(model):
        ours = Sampler(steps=3)(model, ["a bird"], [1])
    theirs = model.pipeline("a bird", negative_prompt="cat, dog", num_inference_steps=3, output_type="pt",
                            generator=torch.Generator().manual_seed(1)).images  # fmt: skip
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)

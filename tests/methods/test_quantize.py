"""Quantisation: rounds weights to the nearest of evenly spaced levels, with one scale for each group."""

import pytest
import torch

from unlearning.concepts import Concept, UnlearningTask
from unlearning.methods.quantize import Quantization
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.training.student import LoRA

TASK = UnlearningTask((Concept("cat"),))


@pytest.fixture(scope="module")
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


@pytest.mark.parametrize("shape", [(5, 30), (5, 10, 3, 3)])
@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, 16), (2, None)])
def test_a_weight_goes_to_the_nearest_level_of_its_group(shape, bits, group):
    torch.manual_seed(0)
    weight, quantized = torch.randn(shape), Quantization(bits=bits, group=group)
    rounded = quantized.rounded(weight)
    levels = 2 ** (bits - 1) - 1
    for row, own in zip(weight.flatten(1), rounded.flatten(1), strict=True):
        for part, values in zip(row.split(group or len(row)), own.split(group or len(row)), strict=True):
            scale = part.abs().max() / levels
            grid = torch.arange(-levels, levels + 1) * scale
            nearest = (part[:, None] - grid).abs().amin(1)
            torch.testing.assert_close((part - values).abs(), nearest, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(quantized.rounded(rounded), rounded)


def test_weights_of_zero_stay_zero():
    assert not Quantization(bits=4).rounded(torch.zeros(3, 4)).any()


def test_maps_and_convolutions_are_rounded_and_nothing_else(model):
    patch = Quantization(bits=8).fit(model, TASK)
    assert {name.partition(".")[0] for name in patch.weights} == {"unet"}
    assert "unet.conv_in.weight" in patch.weights and not [n for n in patch.weights if "norm" in n or "bias" in n]
    both = Quantization(bits=8, text_encoders=True).fit(model, TASK)
    assert {name.partition(".")[0] for name in both.weights} == {"unet", "text_encoder"}


def test_adapters_beside_the_weights_do_not_change(model):
    plain = Quantization(bits=4).fit(model, TASK)
    with LoRA(r"unet\..*attn2\.to_k$").of(model) as pair:
        adapter = pair.erasure()
    with adapter.applied_to(model):
        assert Quantization(bits=4).fit(model, TASK).digest == plain.digest

"""Cross-attention maps: what a UNet's layers compute, recorded without a change to what they compute."""

import pytest
import torch

from tests import tiny
from unlearning.errors import UserError
from unlearning.models.attention import cross_attention, cross_attention_maps
from unlearning.models.diffusion import outputs_of
from unlearning.models.stable_diffusion import StableDiffusion


@pytest.fixture
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


@pytest.fixture
def inputs(model):
    return model.noise([1, 2]), torch.tensor([400, 100]), model.encode_prompts(["a cat", "dogs"])


def test_the_maps_are_those_by_which_each_layer_mixes_the_text(model, inputs):
    name, layer = next(iter(cross_attention(model).items()))
    with cross_attention_maps(model) as maps, outputs_of(layer) as outputs, torch.no_grad():
        model.predict(*inputs)
        mixed = maps[name][0] @ layer.to_v(inputs[2].embeds).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
        torch.testing.assert_close(layer.to_out[0](mixed.transpose(1, 2).flatten(2)), outputs[0])


def test_every_layer_is_recorded_at_each_call_and_no_prediction_changes(model, inputs):
    before = model.predict(*inputs)
    with cross_attention_maps(model) as maps:
        assert torch.equal(model.predict(*inputs), before)
        model.predict(*inputs)
    assert maps.keys() == cross_attention(model).keys()
    for first, second in maps.values():
        assert torch.equal(first, second)
        assert first.shape[:1] == (2,) and first.shape[-1] == inputs[2].embeds.shape[1]
        torch.testing.assert_close(first.sum(-1), torch.ones_like(first[..., 0]))
    assert torch.equal(model.predict(*inputs), before)
    assert all(len(calls) == 2 for calls in maps.values()), "nothing is recorded once the context is left"


def test_a_loss_of_the_maps_reaches_the_weights(model, inputs):
    weight = next(iter(cross_attention(model).values())).to_k.weight.requires_grad_()
    with cross_attention_maps(model) as maps:
        model.predict(*inputs)
    sum(calls[0][..., 1].sum() for calls in maps.values()).backward()
    assert weight.grad.any()


@pytest.mark.parametrize("family", ["sd3", "flux", "pixart", "dit"])
def test_a_denoiser_without_a_unet_is_refused(family, tmp_path):
    model = tiny.FAMILIES[family].load(str(tiny.save(family, tmp_path)), device="cpu")
    with pytest.raises(UserError, match="UNet"), cross_attention_maps(model):
        pass

"""Cross-attention maps: recording them equals the layers' own computation and does not change it."""

import pytest
import torch

from tests import tiny
from unlearning.errors import UserError
from unlearning.models.attention import (
    concept_places,
    cross_attention,
    cross_attention_maps,
    text_attention,
    text_attention_maps,
)
from unlearning.models.layers import outputs_of
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


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_joint_maps_are_those_by_which_each_layer_mixes_the_text(family, tmp_path):
    """All values are made zero but those of one text token: a layer's output is then that token's column times them."""
    model = tiny.FAMILIES[family].load(str(tiny.save(family, tmp_path)), device="cpu")
    inputs = model.noise([1, 2]), torch.tensor([400, 100]), model.encode_prompts(["a cat", "dogs"])
    before = model.predict(*inputs)
    layers = text_attention(model)
    assert layers.keys() == {f"transformer.transformer_blocks.{i}.attn" for i in range(2)}
    for name, layer in layers.items():
        token, values = 3, []
        of_text = layer.add_v_proj.register_forward_hook(lambda _, __, v: values.append(only(v, token)) or values[-1])  # noqa: B023
        of_image = layer.to_v.register_forward_hook(lambda _, __, v: torch.zeros_like(v))
        with text_attention_maps(model) as maps, outputs_of(layer) as outputs, torch.no_grad():
            model.predict(*inputs)
        of_text.remove(), of_image.remove()
        column = maps[name][0][..., token]  # (B, N, P)
        v = values[0][:, token].unflatten(-1, (layer.heads, -1))  # (B, N, d)
        mixed = torch.einsum("bnp,bnd->bpnd", column, v).flatten(2)
        torch.testing.assert_close(layer.to_out[0](mixed), outputs[0][0])
    assert torch.equal(model.predict(*inputs), before)


def only(states, token):
    """The states with zeros for all other tokens."""
    kept = torch.zeros_like(states)
    kept[:, token] = states[:, token]
    return kept


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3", "flux"])
def test_a_concepts_places_are_those_where_a_change_of_the_word_begins(family, tmp_path):
    model = tiny.FAMILIES[family].load(str(tiny.save(family, tmp_path)), device="cpu")
    [places] = concept_places(model, ["a b cat"], ["cat"])
    [more] = concept_places(model, ["a b cat"], ["cat"], end=True)
    same = (model.encode_prompts(["a b cat"]).embeds == model.encode_prompts(["a b dog"]).embeds)[0].all(-1)
    sequences = {"sd1": 1, "sdxl": 1, "sd3": 2, "flux": 1}[family]
    assert places.any() and (more & ~places).sum() == sequences
    if family != "flux":  # in T5 all states change
        clip = model.pipeline.tokenizer.model_max_length
        assert places[:clip].nonzero()[0] == (~same[:clip]).nonzero()[0]


def test_a_word_missing_from_its_prompt_gives_an_error(model):
    with pytest.raises(UserError, match="dog"):
        concept_places(model, ["a cat"], ["dog"])


@pytest.mark.parametrize("family", ["pixart", "dit"])
def test_a_denoiser_without_attention_to_text_that_is_known_is_refused(family, tmp_path):
    model = tiny.FAMILIES[family].load(str(tiny.save(family, tmp_path)), device="cpu")
    with pytest.raises(UserError, match="attention"):
        text_attention(model)

"""Textual inversion: trainable and frozen parameters, and the placeholder's position in every text encoder."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests import tiny
from unlearning.errors import UserError
from unlearning.models.dit import DiT
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.denoising import noised
from unlearning.sampling.inversion import Placeholder, first_piece, invert

Adam = partial(torch.optim.Adam, lr=0.05)


@pytest.fixture
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


@pytest.fixture
def reader(any_model):
    """A tiny model of every family that reads text."""
    if isinstance(any_model, DiT):
        pytest.skip("reads no text")
    return any_model


def test_a_loss_is_minimised_in_the_parameters(model):
    v, target = nn.Parameter(torch.zeros(5)), torch.arange(5.0)
    losses = invert(model, [v], lambda: F.mse_loss(v, target), optimizer=partial(torch.optim.SGD, lr=1), iterations=80)
    torch.testing.assert_close(v.detach(), target, atol=1e-3, rtol=0)
    assert len(losses) == 80 and losses[-1] < 1e-3 * losses[0]


def test_accumulated_batches_are_one_step_along_their_mean_gradient(model):
    v, w = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))
    targets = iter([1.0, 2.0, 6.0])
    sgd = partial(torch.optim.SGD, lr=0.5)
    invert(model, [v], lambda: (v - next(targets)).square().sum(), optimizer=sgd, iterations=1, accumulate=3)
    invert(model, [w], lambda: (w - 3.0).square().sum(), optimizer=sgd, iterations=1)
    torch.testing.assert_close(v, w)


def test_no_weight_of_the_model_gets_a_gradient_not_even_a_trainable_one(model):
    model.denoiser.requires_grad_(True)
    c, v = model.encode_prompts(["cat"]), nn.Parameter(torch.zeros(1))
    latents = torch.randn(2, *model.latent_shape)

    def loss():
        z_t, t = noised(model, latents)
        return (model.predict(z_t, t, c.expand(2)) * v).square().mean()

    invert(model, [v], loss, optimizer=Adam, iterations=2)
    assert all(p.grad is None for p in model.named_parameters().values())


def test_a_loss_that_is_not_finite_is_an_error(model):
    v = nn.Parameter(torch.zeros(1))
    with pytest.raises(UserError, match="nan"):
        invert(model, [v], lambda: (v / 0 * 0).sum(), optimizer=Adam, iterations=3)


@pytest.mark.parametrize("any_pipeline", ["sdxl", "sd3"], indirect=True)
def test_only_the_placeholders_embeddings_are_replaced_in_every_encoder(reader):
    prompts = ["a photo of a {}", "{} and a dog"]
    place = Placeholder.in_prompts(reader, prompts)
    filled = place.filled({part: torch.full(e.shape[-1:], 7.0) for part, e in place.text.embeds.items()})
    assert filled.embeds.keys() == reader.text_encoders.keys()
    for part, e in filled.embeds.items():
        changed = (e != place.text.embeds[part]).any(-1)
        assert changed.sum(1).tolist() == [1, 1]
        assert (e[changed] == 7).all()


def test_the_placeholder_is_where_the_prompt_says(model):
    [mask] = Placeholder.in_prompts(model, ["a {} b {}"]).places.values()
    assert mask[0].nonzero().flatten().tolist() == [2, 4]  # behind the start of text, a piece for each letter


@pytest.mark.parametrize("any_pipeline", ["sdxl", "sd3"], indirect=True)
def test_the_conditioning_depends_on_v_and_has_a_gradient(reader):
    place = Placeholder.in_prompts(reader, ["a photo of a {}"])
    v = {part: nn.Parameter(e[0, 0].clone()) for part, e in place.text.embeds.items()}
    c = reader.encode(place.filled(v))
    total = c.embeds.float().square().sum() + sum(e.float().square().sum() for e in c.extra.values())
    total.backward()
    assert all(p.grad.abs().sum() > 0 for p in v.values())


def test_placeholders_can_be_filled_in_some_rows_only(model):
    place = Placeholder.in_prompts(model, ["a {}", "the {}", "{}"])
    v = first_piece(model, "cat")
    every, some = place.filled(v), place.filled(v, [2, 0])
    assert some.prompts == (every.prompts[2], every.prompts[0])
    assert all(torch.equal(e, every.embeds[part][[2, 0]]) for part, e in some.embeds.items())


def test_a_prompt_that_is_too_long_has_no_place(model):
    with pytest.raises(UserError, match="too long"):
        Placeholder.in_prompts(model, ["very " * 30 + "{}"])


def test_classes_have_no_placeholder_and_no_token_table(tmp_path):
    model = DiT.load(str(tiny.save("dit", tmp_path)), device="cpu")
    with pytest.raises(UserError, match="classes"):
        Placeholder.in_prompts(model, ["a photo of a {}"])
    with pytest.raises(UserError, match="classes"):
        model.token_table()


@pytest.mark.parametrize("word", ["x", "xylophone"])
def test_a_words_first_piece_is_what_its_tokenizer_begins_with(model, word):
    [embedding] = first_piece(model, word).values()
    table = model.parts["text_encoder"].get_input_embeddings().weight
    assert torch.equal(embedding, table[model.token_ids([word])[0][0]])


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_a_text_is_its_tokens_joined_and_read_as_their_embeddings(reader):
    prompt = "q and a w"
    for part in reader.text_encoders:
        embeds, texts = reader.token_table(part)
        [ids] = reader.token_ids([prompt], part)
        assert "".join(texts[i] for i in ids).strip() == prompt
        assert len(texts) == len(embeds) == reader.text_encoders[part].get_input_embeddings().num_embeddings
        read = reader.embed([prompt]).embeds[part][0]
        assert all((read == embeds[i]).all(-1).any() for i in ids)


def test_special_tokens_have_no_text(model):
    _, texts = model.token_table()
    tokenizer = model.pipeline.tokenizer
    assert [i for i, text in enumerate(texts) if not text] == sorted(tokenizer.all_special_ids)


def test_each_place_of_a_placeholder_can_have_a_vector_of_its_own(reader):
    place, letters = Placeholder.in_prompts(reader, ["{} {}", "{} {}"]), ["a b", "c d"]
    v, own = {}, reader.embed(letters)
    for part in reader.text_encoders:
        embeds, texts = reader.token_table(part)
        ids = [[i for i in ids if texts[i].strip()] for ids in reader.token_ids(letters, part)]
        v[part] = embeds[torch.tensor(ids)].requires_grad_()
    filled = place.filled(v)
    assert all(torch.equal(filled.embeds[part], e) for part, e in own.embeds.items())
    reader.encode(filled).embeds.sum().backward()
    assert any(e.grad is not None for e in v.values())
    one = next(iter(v))
    alone = place.filled({one: v[one]}).embeds
    assert all(torch.equal(alone[part], e) for part, e in place.text.embeds.items() if part != one)

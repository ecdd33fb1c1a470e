"""What the student is told comes from the teacher, whatever its family."""

from functools import partial

import pytest
import torch

from unlearning.errors import UserError
from unlearning.scrubbing import conditioning
from unlearning.scrubbing.conditioning import TEMPLATES, explained, inverted, told

WORDS = ["cat", "dog", "tiger"]


@pytest.fixture
def model(any_model):
    return any_model


@pytest.fixture
def pictures(model):
    """Latents of four forget and of four retain pictures, and masks of the first."""
    torch.manual_seed(0)
    forget, retain = torch.randn(2, 4, *model.latent_shape)
    return forget, retain, torch.rand(4, 1, *model.latent_shape[1:])


def test_an_embedding_is_inverted_in_every_family_but_that_of_classes(model, pictures, monkeypatch):
    monkeypatch.setattr(conditioning, "inverted", partial(inverted, steps=2))
    null = model.encode_prompts([""])
    if not null.embeds.is_floating_point():
        with pytest.raises(UserError, match="conditioning=words"):
            told("inverted", model, None, *pictures)
        return
    said = told("inverted", model, None, *pictures)
    assert len(said.retain) == 1 and torch.equal(said.forget.embeds[0], null.embeds[0])
    assert len(said.forget.embeds.unique(dim=0)) == len(said.forget) == 5 and set(said.forget.extra) == set(null.extra)
    assert model.predict(model.noise([0] * 5), torch.tensor(500), said.forget).isfinite().all()


def test_words_are_tried_in_every_family(model, pictures, monkeypatch):
    """Random weights have no word for random pictures: that one is evident is made so, once all have been tried."""
    tried = []

    def for_a_dog(teacher, latents, words, looks):
        tried.append(explained(teacher, latents, words, looks))
        return torch.tensor([[float(word == "dog")] for word in words]).expand(-1, looks)

    monkeypatch.setattr(conditioning, "LAST_LOOKS", 8)
    monkeypatch.setattr(conditioning, "explained", for_a_dog)
    said = told("words", model, None, *pictures, WORDS)
    [found] = tried
    assert found.isfinite().all() and len(found[: len(WORDS)].unique(dim=0)) == len(WORDS) and found.shape[1] == 8
    assert said.words == ("dog",) and len(said.forget) == 1 + len(TEMPLATES)
    assert model.predict(model.noise([0]), torch.tensor(500), said.forget[1:2]).isfinite().all()

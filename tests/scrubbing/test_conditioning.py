"""The student's conditioning."""

import numpy as np
import pytest
import torch

from unlearning.errors import UserError
from unlearning.scrubbing.conditioning import conditioning_rows, inverted
from unlearning.scrubbing.words import TEMPLATES, log_error_ratio


@pytest.fixture
def model(embedded):
    return embedded


def test_an_inverted_embedding_denoises_the_concept_better_than_the_null_prompt(model, rabbits):
    torch.manual_seed(0)
    _, forget, _, M = rabbits
    null, *found = inverted(model, forget, M, rows=2, steps=15, batch=4).embeds
    assert torch.equal(null, model.encode_prompts([""]).embeds[0]) and len(found) == 2

    def gain(embeds) -> float:
        torch.manual_seed(1)
        c, encode = model.encode_prompts([""]), model.encode_prompts
        row = type(c)(embeds[None])
        model.encode_prompts = lambda prompts: type(c).cat([row if prompt else c for prompt in prompts])
        try:
            return log_error_ratio(model, forget, ["x"], samples=16).mean().item()
        finally:
            model.encode_prompts = encode

    assert abs(gain(null)) < 1e-6, "the two are in one batch"
    assert np.mean([gain(e) for e in found]) > 1e-4


@pytest.mark.parametrize(("kind", "count"), [("null", 1), ("caption", 1 + 3 * len(TEMPLATES))])
def test_the_number_of_rows(model, rabbits, kind, count):
    rows = conditioning_rows(kind, model, *rabbits)
    assert len(rows.forget) == count and torch.equal(rows.forget.embeds[0], model.encode_prompts([""]).embeds[0])
    assert rows.words == (("rabbit", "bunny", "hare") if kind == "caption" else ())


def test_an_unknown_conditioning_lists_the_known_ones(model, rabbits):
    with pytest.raises(UserError, match="caption"):
        conditioning_rows("guess", model, *rabbits)


def test_the_vocabulary_has_whole_words_only(model):
    words = model.vocabulary()
    assert {"cat", "rabbit", "photo"} <= set(words) and all(len(w) >= 3 and w.isalpha() for w in words)

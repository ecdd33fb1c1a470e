"""The student's conditioning."""

import pytest
import torch

from unlearning.errors import UserError
from unlearning.scrubbing.conditioning import conditioning_rows
from unlearning.scrubbing.words import TEMPLATES


@pytest.fixture
def model(embedded):
    return embedded


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

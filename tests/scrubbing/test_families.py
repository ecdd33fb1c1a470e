"""The student's conditioning, for every family of models."""

import pytest
import torch

from unlearning.scrubbing import words as word_search
from unlearning.scrubbing.conditioning import conditioning_rows
from unlearning.scrubbing.words import TEMPLATES, log_error_ratio

WORDS = ["cat", "dog", "tiger"]


@pytest.fixture
def model(any_model):
    return any_model


@pytest.fixture
def images(model):
    """Latents of four forget and four retain images, and masks of the first."""
    torch.manual_seed(0)
    forget, retain = torch.randn(2, 4, *model.latent_shape)
    return forget, retain, torch.rand(4, 1, *model.latent_shape[1:])


def test_words_are_searched_in_every_family(model, images, monkeypatch):
    """A model with random weights has no word for random images, so the evidence is replaced once it is measured."""
    measured = []

    def for_dog(teacher, latents, words, samples):
        measured.append(log_error_ratio(teacher, latents, words, samples))
        return torch.tensor([[float(word == "dog")] for word in words]).expand(-1, samples)

    monkeypatch.setattr(word_search, "FINAL_SAMPLES", 8)
    monkeypatch.setattr(word_search, "log_error_ratio", for_dog)
    rows = conditioning_rows("words", model, None, *images, WORDS)
    [ratios] = measured
    assert ratios.isfinite().all() and len(ratios[: len(WORDS)].unique(dim=0)) == len(WORDS) and ratios.shape[1] == 8
    assert rows.words == ("dog",) and len(rows.forget) == 1 + len(TEMPLATES)
    assert model.predict(model.noise([0]), torch.tensor(500), rows.forget[1:2]).isfinite().all()

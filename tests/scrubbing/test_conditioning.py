"""The student's conditioning: words are found from images alone, with the embedded model."""

from pathlib import Path

import numpy as np
import pytest
import torch

import unlearning
from unlearning.data.objects import emoji_objects
from unlearning.errors import UserError
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.scrubbing import conditioning
from unlearning.scrubbing.conditioning import (
    FINALISTS,
    RETAIN_WORDS,
    TEMPLATES,
    conditioning_rows,
    find_words,
    inverted,
    log_error_ratio,
    spread,
)
from unlearning.training.forget_retain import encoded

WORDS = ["rabbit", "bunny", "clock", "pizza", "dog", "castle", "banana", "robot", "key", "forest"]


@pytest.fixture(scope="module")
def model():
    return StableDiffusion.load(str(Path(unlearning.__file__).parent / "weights" / "emoji_unet"), device="cpu")


@pytest.fixture
def few_samples(monkeypatch):
    """A last round that is short, for words that are far apart."""
    monkeypatch.setattr(conditioning, "FINAL_SAMPLES", 64)


@pytest.fixture(scope="module")
def rabbits(model):
    """(task, forget, retain, M) of a dozen images of each kind, with true masks."""
    torch.manual_seed(0)
    task = emoji_objects("rabbit", pictures=12)
    forget, retain = (encoded(model, images) for images in (task.forget_images, task.retain_images))
    true = torch.from_numpy(np.stack([picture.masks[0] for picture in task.forget_images.pictures])).float()
    return task, forget, retain, torch.nn.functional.avg_pool2d(true[:, None], 4)


def test_the_words_that_describe_the_images_are_found_without_a_label(model, rabbits, few_samples):
    torch.manual_seed(0)
    found, others = find_words(model, *rabbits[1:], WORDS, samples=12)
    assert set(found) == {"rabbit", "bunny"}
    assert not others, "words of the last round are not used for the retain images"


def test_few_candidates_are_completed_for_the_retain_images(model, rabbits, monkeypatch):
    def for_rabbit(teacher, latents, words, samples):
        return torch.tensor([[float(word in ("rabbit", "bunny"))] for word in words]).expand(-1, samples)

    monkeypatch.setattr(conditioning, "log_error_ratio", for_rabbit)
    few, all_ = (conditioning_rows("words", model, *rabbits, words) for words in (["rabbit", "clock"], None))
    assert "rabbit" in few.words and set(few.words) <= set(all_.words) == {"rabbit", "bunny"}
    for rows in (few, all_):
        assert len(rows.retain) == 1 + RETAIN_WORDS * len(TEMPLATES)


def test_a_large_vocabulary_is_narrowed_down_in_rounds(model, rabbits, few_samples, monkeypatch):
    monkeypatch.setattr(conditioning, "FINALISTS", 4)
    torch.manual_seed(0)
    found, others = find_words(model, *rabbits[1:], WORDS, samples=8)
    assert found[0] in ("rabbit", "bunny") and set(found) <= {"rabbit", "bunny"}
    assert others and not set(others) & set(found)


def test_no_word_that_helps_is_an_error(model, rabbits, few_samples):
    with pytest.raises(UserError, match=r"method\.words"):
        find_words(model, *rabbits[1:], ["pizza", "castle", "robot"], samples=12)


@pytest.fixture
def search(monkeypatch):
    """search(words, of_forget, of_retain=None) -> find_words' result if these functions are the log error ratios."""

    def find(words, of_forget, of_retain=None):
        def log_error_ratio(teacher, latents, words, samples):
            return (of_forget if latents.mean() > 0 else of_retain)(words, samples)

        monkeypatch.setattr(conditioning, "log_error_ratio", log_error_ratio)
        return find_words(None, torch.ones(4, 1, 2, 2), -torch.ones(4, 1, 2, 2), torch.rand(4, 1, 2, 2), words)

    return find


def test_a_style_is_found_though_no_word_helps_its_images(search):
    """The word neon costs the retain images far more; the word the costs them as much."""
    costs = {"neon": (-0.02, -0.45), "the": (-0.01, -0.01), "pixel": (-0.5, -0.6), "cat": (-0.03, -0.04)}
    found, _ = search(list(costs), *(
        lambda words, samples, kind=kind: torch.tensor([[costs[w][kind]] * samples for w in words]) for kind in (0, 1)
    ))  # fmt: skip
    assert found == ["neon"]


def test_the_retain_images_do_not_matter_if_a_word_helps(search):
    gains = {"cat": 0.05, "kitty": 0.04, "dog": 0.01, "pixel": -0.01}
    found, _ = search(list(gains), lambda words, samples: torch.tensor([[gains[word]] * samples for word in words]))
    assert found == ["cat", "kitty"]


def test_the_words_for_retain_images_range_from_the_worst_to_the_best(search):
    words = [f"w{i:03}" for i in range(267)]
    found, others = search(words, lambda words, samples: torch.tensor([[float(word[1:])] * samples for word in words]))
    assert found[0] == "w266" and others == words[: 267 - FINALISTS]
    places = [words.index(word) for word in spread(others, RETAIN_WORDS)]
    assert len(places) == RETAIN_WORDS and places == sorted(places)
    assert places[0] == 0 and places[-1] == 266 - FINALISTS and max(np.diff(places)) <= 4


@pytest.mark.parametrize("helps", [0.1, 1.0])
def test_a_word_that_may_be_chance_gives_a_warning(search, caplog, helps):
    """All ratios are noise, except that of one word."""
    torch.manual_seed(0)
    words = [f"w{i}" for i in range(16)]

    def noise(words, samples):
        return torch.randn(len(words), samples) + helps * torch.tensor([[word == "w7"] for word in words])

    found, _ = search(words, noise, noise)
    assert ("hardly better" in caplog.text) == (helps < 1)
    assert found == ["w7"] or helps < 1


def test_an_inverted_embedding_denoises_the_concept_better_than_the_null_prompt(model, rabbits):
    torch.manual_seed(0)
    _, forget, _, M = rabbits
    null, *found = inverted(model, forget, M, rows=2, steps=25).embeds
    assert torch.equal(null, model.encode_prompts([""]).embeds[0]) and len(found) == 2

    def gain(embeds) -> float:
        torch.manual_seed(1)
        c, encode = model.encode_prompts([""]), model.encode_prompts
        row = type(c)(embeds[None])
        model.encode_prompts = lambda prompts: type(c).cat([row if prompt else c for prompt in prompts])
        try:
            return log_error_ratio(model, forget, ["x"], samples=24).mean().item()
        finally:
            model.encode_prompts = encode

    assert gain(null) == 0 < np.mean([gain(e) for e in found])


@pytest.mark.parametrize(("kind", "count"), [("null", 1), ("caption", 1 + 3 * len(TEMPLATES))])
def test_the_number_of_rows(model, rabbits, kind, count):
    rows = conditioning_rows(kind, model, *rabbits)
    assert len(rows.forget) == count and torch.equal(rows.forget.embeds[0], model.encode_prompts([""]).embeds[0])
    assert not rows.words


def test_an_unknown_conditioning_lists_the_known_ones(model, rabbits):
    with pytest.raises(UserError, match="caption"):
        conditioning_rows("guess", model, *rabbits)


def test_the_vocabulary_has_whole_words_only(model):
    words = model.vocabulary()
    assert {"cat", "rabbit", "photo"} <= set(words) and all(len(w) >= 3 and w.isalpha() for w in words)

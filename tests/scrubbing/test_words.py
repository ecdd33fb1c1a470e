"""Words are found from images alone, with the embedded model."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPModel

import unlearning
from unlearning.errors import UserError
from unlearning.scrubbing import conditioning
from unlearning.scrubbing import words as word_search
from unlearning.scrubbing.conditioning import RETAIN_WORDS, conditioning_rows
from unlearning.scrubbing.words import FINALISTS, TEMPLATES, find_words, log_error_ratio, shortlist, spread, words_of
from unlearning.store import loops

CLIP = Path(unlearning.__file__).parent / "weights" / "clip"
WORDS = ["rabbit", "bunny", "clock", "pizza", "castle", "robot"]


@pytest.fixture
def model(embedded):
    return embedded


@pytest.fixture
def few_samples(monkeypatch):
    """A last round that is short, for words that are far apart."""
    monkeypatch.setattr(word_search, "FINAL_SAMPLES", 32)


def test_the_words_that_describe_the_images_are_found_without_a_label(model, rabbits, few_samples):
    torch.manual_seed(0)
    found, others = find_words(model, *rabbits[1:], WORDS, samples=12)
    assert set(found) == {"rabbit", "bunny"}
    assert not others, "words of the last round are not used for the retain images"


@pytest.fixture
def for_rabbit(monkeypatch):
    """The teacher, as if only two words helped it."""

    def ratio(teacher, latents, words, samples):
        return torch.tensor([[float(word in ("rabbit", "bunny"))] for word in words]).expand(-1, samples)

    monkeypatch.setattr(word_search, "log_error_ratio", ratio)


def test_the_rest_of_the_vocabulary_is_there_for_the_retain_images(model, rabbits, for_rabbit, monkeypatch):
    monkeypatch.setattr(conditioning, "RETAIN_WORDS", 8)
    few, all_ = (conditioning_rows("words", model, *rabbits, words) for words in (["rabbit", "clock"], None))
    assert few.words == ("rabbit",) and set(all_.words) == {"rabbit", "bunny"}
    for rows in (few, all_):
        assert len(rows.retain) == 1 + 8 * len(TEMPLATES)


def test_a_clip_chooses_the_candidates(model, rabbits, for_rabbit, monkeypatch):
    task, vocabulary = rabbits[0], model.vocabulary()
    best = shortlist(str(CLIP), task.forget_images, vocabulary, 10)
    assert {"rabbit", "bunny", "hare"} <= set(best) and len(best) == 10 and best == sorted(best, key=vocabulary.index)
    asked, ratio = set(), word_search.log_error_ratio
    monkeypatch.setattr(word_search, "log_error_ratio", lambda t, z, w, n: (asked.update(w), ratio(t, z, w, n))[1])
    chosen, others = words_of(task, model, *rabbits[1:], clip=str(CLIP))
    assert asked == set(shortlist(str(CLIP), task.forget_images, vocabulary)) >= set(chosen)
    assert "rabbit" in chosen and set(others) | asked == set(vocabulary)


def test_the_shipped_clip_reads_as_the_shipped_generator_does(model):
    """Its text tower is that of emoji_unet."""
    read, [encoder] = CLIPModel.from_pretrained(CLIP).text_model.state_dict(), model.text_encoders.values()
    assert all(torch.equal(read[name], weight) for name, weight in encoder.state_dict().items())


def test_a_missing_clip_is_reported(model, rabbits, tmp_path):
    with pytest.raises(UserError, match=r"method\.clip"):
        words_of(*rabbits[:1], model, *rabbits[1:], clip=str(tmp_path))


def test_an_interrupted_search_resumes_where_it_was(model, rabbits, tmp_path, monkeypatch):
    monkeypatch.setattr(loops, "EVERY", 0)
    calls, predict = [], type(model).predict

    def search():
        torch.manual_seed(0)
        return log_error_ratio(model, rabbits[1], WORDS[:4], 16)

    def counted(*arguments):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return predict(*arguments)

    whole = search()
    monkeypatch.setattr(type(model), "predict", counted)
    with pytest.raises(KeyboardInterrupt), loops.kept_in(tmp_path / "search"):
        search()
    with loops.kept_in(tmp_path / "search"):
        again = search()
    assert torch.equal(again, whole) and len(calls) == 1 + 3, "80 errors, 32 at a time"


def test_a_large_vocabulary_is_narrowed_down_in_rounds(model, rabbits, few_samples, monkeypatch):
    monkeypatch.setattr(word_search, "FINALISTS", 3)
    torch.manual_seed(0)
    found, others = find_words(model, *rabbits[1:], WORDS, samples=8)
    assert found[0] in ("rabbit", "bunny") and set(found) <= {"rabbit", "bunny"}
    assert others and not set(others) & set(found)


@pytest.fixture
def search(monkeypatch):
    """search(words, of_forget, of_retain=None) -> find_words' result if these functions are the log error ratios."""

    def find(words, of_forget, of_retain=None):
        def log_error_ratio(teacher, latents, words, samples):
            return (of_forget if latents.mean() > 0 else of_retain)(words, samples)

        monkeypatch.setattr(word_search, "log_error_ratio", log_error_ratio)
        return find_words(None, torch.ones(4, 1, 2, 2), -torch.ones(4, 1, 2, 2), torch.rand(4, 1, 2, 2), words)

    return find


def test_a_style_is_found_even_if_no_word_helps_its_images(search):
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


def test_no_word_that_helps_is_an_error(search):
    def costs(words, samples):
        return torch.full((len(words), samples), -0.1)

    with pytest.raises(UserError, match=r"method\.words"):
        search(["pizza", "castle", "robot"], costs, lambda words, samples: torch.zeros(len(words), samples))


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

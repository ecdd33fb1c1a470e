"""What the student is told: a vocabulary's words are found by the pictures alone, on the embedded world."""

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
    GENERIC,
    MOST,
    RETAINED,
    TEMPLATES,
    explained,
    inverted,
    nearest_words,
    told,
)
from unlearning.training.forget_retain import encoded

WORDS = ["rabbit", "bunny", "clock", "pizza", "dog", "castle", "banana", "robot", "key", "forest"]


@pytest.fixture(scope="module")
def model():
    return StableDiffusion.load(str(Path(unlearning.__file__).parent / "weights" / "emoji_unet"), device="cpu")


@pytest.fixture(scope="module")
def rabbits(model):
    """(task, forget, retain, masks) of a dozen pictures of each kind, the masks being the true ones."""
    torch.manual_seed(0)
    task = emoji_objects("rabbit", pictures=12)
    forget, retain = (encoded(model, images) for images in (task.forget_images, task.retain_images))
    true = torch.from_numpy(np.stack([picture.masks[0] for picture in task.forget_images.pictures])).float()
    return task, forget, retain, torch.nn.functional.avg_pool2d(true[:, None], 4)


def test_the_words_that_stand_for_the_pictures_are_found_without_a_label(model, rabbits):
    torch.manual_seed(0)
    found, others = nearest_words(model, *rabbits[1:], WORDS, looks=12)
    assert set(found) == {"rabbit", "bunny"}
    assert not others, "what is left when the last sixteen are ranked is not held on to"


def test_beside_few_words_to_try_there_are_others_to_hold_in_place(model, rabbits, monkeypatch):
    def for_a_rabbit(teacher, latents, words, looks):
        return torch.tensor([[float(word in ("rabbit", "bunny"))] for word in words]).expand(-1, looks)

    monkeypatch.setattr(conditioning, "explained", for_a_rabbit)
    few, all_ = (told("words", model, *rabbits, words) for words in (["rabbit", "clock"], None))
    assert "rabbit" in few.words and set(few.words) <= set(all_.words) == {"rabbit", "bunny"}
    for said in (few, all_):
        assert len(said.retain) == 1 + RETAINED * len(TEMPLATES)


def test_a_large_vocabulary_is_narrowed_down_and_the_rest_held_on_to(model, rabbits, monkeypatch):
    monkeypatch.setattr(conditioning, "MOST", 4)
    torch.manual_seed(0)
    found, others = nearest_words(model, *rabbits[1:], WORDS, looks=8)
    assert found[0] in ("rabbit", "bunny") and set(found) <= {"rabbit", "bunny"}
    assert others and not set(others) & set(found)


def test_no_word_that_helps_is_an_error_that_says_what_to_do(model, rabbits):
    with pytest.raises(UserError, match=r"method\.words"):
        nearest_words(model, *rabbits[1:], ["pizza", "castle", "robot"], looks=12)


@pytest.fixture
def evident(monkeypatch):
    """evident(of_forget, of_retain=None) -> nearest_words' answer for the words of which a function is given.

    of_forget(words, looks) is how much better each explains forget pictures than the null prompt does.
    """

    def find(words, of_forget, of_retain=None):
        def explained(teacher, latents, words, looks):
            return (of_forget if latents.mean() > 0 else of_retain)(words, looks)

        monkeypatch.setattr(conditioning, "explained", explained)
        return nearest_words(None, torch.ones(4, 1, 2, 2), -torch.ones(4, 1, 2, 2), torch.rand(4, 1, 2, 2), words)

    return find


def test_a_style_is_named_though_no_word_alone_helps_its_pictures(evident):
    """What `neon` costs it costs all others by far more; what `the` costs, it costs them as well."""
    costs = {"neon": (-0.02, -0.45), "the": (-0.01, -0.01), "pixel": (-0.5, -0.6), "cat": (-0.03, -0.04)}
    found, _ = evident(list(costs), *(
        lambda words, looks, kind=kind: torch.tensor([[costs[w][kind]] * looks for w in words]) for kind in (0, 1)
    ))  # fmt: skip
    assert found == ["neon"]


def test_what_a_word_costs_others_is_of_no_account_where_another_helps(evident):
    gains = {"cat": 0.05, "kitty": 0.04, "dog": 0.01, "pixel": -0.01}
    found, _ = evident(list(gains), lambda words, looks: torch.tensor([[gains[word]] * looks for word in words]))
    assert found == ["cat", "kitty"]


def test_words_that_hold_the_rest_in_place_are_spread_from_the_farthest_to_the_nearest(evident):
    """The nearest relatives are those that drift."""
    words = [f"w{i:03}" for i in range(267)]
    found, others = evident(words, lambda words, looks: torch.tensor([[float(word[1:])] * looks for word in words]))
    places = [words.index(word) for word in others]
    assert found[0] == "w266" and len(others) == RETAINED and places == sorted(places)
    assert places[0] == 0 and places[-1] == 266 - MOST and max(np.diff(places)) <= 4


@pytest.mark.parametrize("helps", [0.1, 1.0])
def test_a_word_that_may_help_by_chance_alone_is_told_of(evident, caplog, helps):
    """What is measured is noise, but for one word's."""
    torch.manual_seed(0)
    words = [f"w{i}" for i in range(16)]

    def noise(words, looks):
        return torch.randn(len(words), looks) + helps * torch.tensor([[word == "w7"] for word in words])

    found, _ = evident(words, noise, noise)
    assert ("give words of your own" in caplog.text) == (helps < 1)
    assert found == ["w7"] or helps < 1


def test_an_inverted_embedding_denoises_the_concept_better_than_the_null_prompt(model, rabbits):
    torch.manual_seed(0)
    _, forget, _, M = rabbits
    null, *found = inverted(model, forget, M, rows=2, steps=25).embeds
    assert torch.equal(null, model.encode_prompts([""]).embeds[0]) and len(found) == 2

    def gain(embeds) -> float:
        torch.manual_seed(1)
        c, encode = model.encode_prompts([""]), model.encode_prompts
        told = type(c)(embeds[None])
        model.encode_prompts = lambda prompts: type(c).cat([told if prompt else c for prompt in prompts])
        try:
            return explained(model, forget, ["x"], looks=24).mean().item()
        finally:
            model.encode_prompts = encode

    assert gain(null) == 0 < np.mean([gain(e) for e in found])


@pytest.mark.parametrize(
    ("kind", "rows"), [("null", 1), ("generic", 1 + len(GENERIC)), ("caption", 1 + 3 * len(TEMPLATES))]
)
def test_how_many_things_are_said(model, rabbits, kind, rows):
    said = told(kind, model, *rabbits)
    assert len(said.forget) == rows and torch.equal(said.forget.embeds[0], model.encode_prompts([""]).embeds[0])
    assert not said.words


def test_an_unknown_conditioning_is_answered(model, rabbits):
    with pytest.raises(UserError, match="null, generic, words, inverted, caption"):
        told("guess", model, *rabbits)


def test_the_vocabulary_is_of_whole_words(model):
    words = model.vocabulary()
    assert {"cat", "rabbit", "photo"} <= set(words) and all(len(w) >= 3 and w.isalpha() for w in words)

"""What the student is told: a vocabulary's words are found by the pictures alone, on the embedded world."""

from pathlib import Path

import numpy as np
import pytest
import torch

import unlearning
from unlearning.concepts import UserError
from unlearning.data.objects import emoji_objects
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.scrubbing.conditioning import GENERIC, TEMPLATES, errors, inverted, nearest_words, told

WORDS = ["rabbit", "bunny", "clock", "pizza", "dog", "castle", "banana", "robot", "key", "forest"]


@pytest.fixture(scope="module")
def model():
    return StableDiffusion.load(str(Path(unlearning.__file__).parent / "weights" / "emoji_unet"), device="cpu")


@pytest.fixture(scope="module")
def rabbits(model):
    """(task, latents, masks) of a dozen pictures, the masks being the true ones."""
    torch.manual_seed(0)
    task = emoji_objects("rabbit", pictures=12)
    x = torch.from_numpy(np.stack(task.forget_images[:])).permute(0, 3, 1, 2) / 255
    true = torch.from_numpy(np.stack([picture.masks[0] for picture in task.forget_images.pictures])).float()
    return task, model.encode_images(x), torch.nn.functional.avg_pool2d(true[:, None], 4)


def test_the_words_that_stand_for_the_pictures_are_found_without_a_label(model, rabbits):
    torch.manual_seed(0)
    found, others = nearest_words(model, *rabbits[1:], WORDS, looks=12)
    assert set(found) == {"rabbit", "bunny"}
    assert not others, "what is left when the last sixteen are ranked is not held on to"


def test_a_large_vocabulary_is_narrowed_down_and_the_rest_held_on_to(model, rabbits, monkeypatch):
    monkeypatch.setattr("unlearning.scrubbing.conditioning.MOST", 4)
    torch.manual_seed(0)
    found, others = nearest_words(model, *rabbits[1:], WORDS, looks=8)
    assert found[0] in ("rabbit", "bunny") and set(found) <= {"rabbit", "bunny"}
    assert others and not set(others) & set(found)


def test_no_word_that_helps_is_an_error_that_says_what_to_do(model, rabbits):
    with pytest.raises(UserError, match=r"method\.words"):
        nearest_words(model, *rabbits[1:], ["pizza", "castle", "robot"], looks=12)


@pytest.mark.parametrize("lowered", [0.1, 1.0])
def test_a_word_that_may_help_by_chance_alone_is_told_of(monkeypatch, caplog, lowered):
    """Errors that are noise, but for one word's, which it lowers."""
    torch.manual_seed(0)
    words = [f"w{i}" for i in range(16)]

    def noise(teacher, latents, M, prompts, looks):
        return torch.randn(len(prompts), looks) - lowered * torch.tensor([[p == "w7"] for p in prompts])

    monkeypatch.setattr("unlearning.scrubbing.conditioning.errors", noise)
    found, _ = nearest_words(None, None, None, words)
    assert ("give words of your own" in caplog.text) == (lowered < 1)
    assert found == ["w7"] or lowered < 1


def test_an_inverted_embedding_denoises_the_concept_better_than_the_null_prompt(model, rabbits):
    torch.manual_seed(0)
    _, latents, M = rabbits
    null, *found = inverted(model, latents, M, rows=2, steps=25).embeds
    assert torch.equal(null, model.encode_prompts([""]).embeds[0]) and len(found) == 2

    def error(embeds) -> float:
        torch.manual_seed(1)
        model_c = model.encode_prompts([""])
        model.encode_prompts = lambda prompts: type(model_c)(embeds[None]).expand(len(prompts))
        try:
            return errors(model, latents, M, ["x"], looks=24).mean().item()
        finally:
            del model.encode_prompts

    assert np.mean([error(e) for e in found]) < error(null)


@pytest.mark.parametrize(
    ("kind", "rows"), [("null", 1), ("generic", 1 + len(GENERIC)), ("caption", 1 + 3 * len(TEMPLATES))]
)
def test_how_many_things_are_said(model, rabbits, kind, rows):
    task, latents, M = rabbits
    said = told(kind, model, task, latents, M)
    assert len(said.forget) == rows and torch.equal(said.forget.embeds[0], model.encode_prompts([""]).embeds[0])
    assert not said.words


def test_an_unknown_conditioning_is_answered(model, rabbits):
    with pytest.raises(UserError, match="null, generic, words, inverted, caption"):
        told("guess", model, *rabbits)


def test_the_vocabulary_is_of_whole_words(model):
    words = model.vocabulary()
    assert {"cat", "rabbit", "photo"} <= set(words) and all(len(w) >= 3 and w.isalpha() for w in words)

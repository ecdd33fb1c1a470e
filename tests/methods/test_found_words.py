"""Methods for found words: the search uses images only, and the wrapped method gets the found words."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import unlearning
from unlearning.concepts import Concept
from unlearning.data.objects import emoji_objects
from unlearning.erasures.base import Erasure
from unlearning.methods import found_words
from unlearning.methods.base import Method
from unlearning.methods.closed_form import pairs
from unlearning.methods.found_words import FoundWords
from unlearning.methods.safree import SAFREE
from unlearning.methods.uce import UCE
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.scrubbing.prototypes import PrototypeSearch
from unlearning.scrubbing.words import TEMPLATES


class Recorder(Method):
    """A method that records its task."""

    def fit(self, model, task) -> Erasure:
        self.task = task
        return UCE().fit(model, task)


@pytest.fixture(scope="module")
def model():
    return StableDiffusion.load(str(Path(unlearning.__file__).parent / "weights" / "emoji_unet"), device="cpu")


@pytest.fixture
def method(monkeypatch):
    monkeypatch.setattr(found_words, "words_of", lambda *_: (["bunny", "rabbit"], ["pizza", "clock", "robot"]))
    return lambda erase, **settings: FoundWords(
        prototypes=PrototypeSearch(K=4, purity=0, draws=1), erase=erase, **settings
    )


def test_the_wrapped_method_gets_prompts_with_and_without_the_found_words(model, method):
    eraser = Recorder()
    method(eraser, retained=4, contexts=2, retained_contexts=1).fit(model, emoji_objects("cat", pictures=6))
    erased = {c.name: c.anchor for c in eraser.task.erase}
    assert len(erased) == 2 * (len(TEMPLATES) + 2)
    for word in ("bunny", "rabbit"):
        assert erased[word] == "" and erased[f"a photo of the {word}"] == "a photo of the"
        assert erased[f"pizza {word}"] == "pizza" and erased[f"robot {word}"] == "robot"
    retained = [c.name for c in eraser.task.retain]
    assert retained[:2] == [TEMPLATES[0].format("pizza"), TEMPLATES[1].format("robot")]
    assert retained[2:] == ["robot pizza", "pizza robot"]


def test_words_are_erased_after_other_words_too(model, method):
    """A prompt with a found word becomes the prompt without it."""
    task = emoji_objects("rabbit", pictures=6)
    name, W = next(iter(model.text_projections()))
    c, without = pairs(model, ["a big pizza rabbit"], ["a big pizza"], "to_end")
    target = without @ W.weight.T

    def left(**settings) -> float:
        with method(UCE(preserve_scale=0.1), **settings).fit(model, task).applied_to(model):
            return float((c @ dict(model.text_projections())[name].weight.T - target).square().sum())

    assert left(contexts=3) < 0.5 * left(contexts=0, retained_contexts=0)


def test_no_label_is_used(model, method):
    task = emoji_objects("rabbit", pictures=6)
    nameless = replace(task, erase=(Concept("x"),), retain=())
    one, other = (method(UCE()).fit(model, own) for own in (task, nameless))
    assert one.digest == other.digest


def test_words_are_erased_and_all_other_words_keep_what_the_denoiser_reads(model, method):
    """W' c equals W c_0 for the found words, and W c for the retained words."""
    erasure = method(UCE(preserve_scale=0.1)).fit(model, emoji_objects("rabbit", pictures=6))
    prompts = ["a photo of the rabbit", "a bunny", "pizza", "a clock", ""]
    c = model.encode_prompts(prompts).embeds.double()
    name, W = next(iter(model.text_projections()))
    before = c @ W.weight.double().T
    with erasure.applied_to(model):
        after = c @ dict(model.text_projections())[name].weight.double().T
    whole = (before - before[-1]).square().sum((1, 2))  # the distance to the null prompt
    moved = (after - before).square().sum((1, 2))
    left = (after - before[-1]).square().sum((1, 2))
    assert (left[:2] < 0.2 * whole[:2]).all() and (moved[2:4] < 0.05 * whole[2:4]).all()
    assert torch.isfinite(after).all()


@pytest.mark.parametrize("eraser", [UCE(), SAFREE()])
def test_its_erasure_is_one_of_the_wrapped_method(method, eraser):
    assert method(eraser).writable == eraser.writable

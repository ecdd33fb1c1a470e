"""P4D: tokens for which the erased model's prediction equals the unedited model's for the target prompt."""

from functools import partial

import pytest
import torch

from tests.attacks.shots import TASK, found_by, rows
from unlearning.attacks.p4d import P4D, with_tokens
from unlearning.concepts import ERASE, Concept, Prompt, UnlearningTask
from unlearning.erasures.guidance_edit import GuidanceEdit
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.guidance import NegativePrompt
from unlearning.sampling.sampler import Sampler
from unlearning.sampling.tokens import Vocabulary

PROMPTS = tuple(Prompt(text, ERASE, {"object": "cat"}) for text in ("a photo of the q", "a q"))
LONGER = UnlearningTask(erase=(Concept("q"),), prompts=PROMPTS)
SAMPLER = Sampler(steps=2, guidance_scale=2.0, batch_size=2)


def attack(**settings) -> P4D:
    short = {"iterations": 3, "tokens": 2, "samples": 4, "check": 2, "batch_size": 2}
    adam = partial(torch.optim.AdamW, lr=0.1, weight_decay=0.1)
    return P4D(images=SAMPLER, optimizer=adam, **(short | settings))


@pytest.fixture
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


def test_tokens_replace_the_prompt_or_stand_among_its_words():
    assert with_tokens("a photo of the cat", "n", 2) == "{} {}"
    assert with_tokens("a photo of the cat", "k", 16) == "a photo of {} the cat {}"


@pytest.mark.parametrize("kind", ["n", "k"])
def test_the_result_consists_of_vocabulary_tokens_that_can_be_typed(model, kind):
    vocabulary = Vocabulary(model)
    for one in found_by(attack(kind=kind), model).prompts:
        tokens, embeds = one.record["tokens"], one.tensors["embeds.text_encoder"]
        assert all(vocabulary.texts[i].strip() for i in tokens)
        table = vocabulary.tables["text_encoder"]
        assert all((embeds == table[i]).all(-1).any() for i in tokens)


def test_the_attack_returns_the_tokens_with_the_smallest_loss(model):
    for one in found_by(attack(iterations=6), model).prompts:
        assert one.record["loss"] == min(one.record["losses"]) and len(one.record["losses"]) == 3


def test_on_the_unedited_model_the_prompt_itself_has_zero_loss(model):
    """The target is what the model predicts for the prompt."""
    search = attack()
    torch.manual_seed(0)
    pairs = search.observe(model, TASK, rows())
    text = model.embed([rows()[0].prompt])
    assert search._losses(model, text, pairs[:1], [torch.arange(4)]).item() < 1e-10
    with GuidanceEdit(NegativePrompt("")).applied_to(model):
        assert search._losses(model, text, pairs[:1], [torch.arange(1)]).item() < 1e-8


def test_prompts_that_are_searched_together_do_not_change_each_other(model, monkeypatch):
    """With k, they have different numbers of tokens."""
    drawn = torch.randint
    monkeypatch.setattr(torch, "multinomial", lambda p, count, **_: torch.arange(count) + 5)

    def found(together: int) -> list:
        search = attack(kind="k", together=together, iterations=4, samples=2, batch_size=2)
        torch.manual_seed(0)
        pairs = search.observe(model, LONGER, rows(LONGER))
        monkeypatch.setattr(torch, "randint", lambda high, shape: torch.arange(2))
        try:
            return search.find(model, LONGER, rows(LONGER), pairs).prompts
        finally:
            monkeypatch.setattr(torch, "randint", drawn)

    for one, other in zip(found(1), found(2), strict=True):
        assert one.record["tokens"] == other.record["tokens"] and one.prompt == other.prompt
        assert one.record["losses"] == pytest.approx(other.record["losses"], rel=1e-4)


def test_a_changed_guidance_is_attacked_through(model):
    with_guidance = found_by(attack(), model, GuidanceEdit(NegativePrompt("q")))
    assert [one.record["loss"] for one in with_guidance.prompts] != [
        one.record["loss"] for one in found_by(attack(), model).prompts
    ]

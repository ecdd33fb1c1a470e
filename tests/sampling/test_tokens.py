"""Prompts as the tokens of one text encoder."""

import pytest
import torch

from tests import tiny
from unlearning.errors import UserError
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.models.stable_diffusion_xl import StableDiffusionXL
from unlearning.sampling import tokens
from unlearning.sampling.tokens import FreeTokens


@pytest.fixture
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


def test_tokens_have_the_states_of_the_text_that_they_write(any_model):
    if not any_model.text_encoders:
        pytest.skip("reads no text")
    free = FreeTokens.of(any_model, 3)
    ids = torch.tensor([i for i in any_model.token_ids(["a q w"], free.encoder)[0] if free.texts[i].strip()])
    if free.text(ids) != "a q w":
        pytest.skip("spaces are tokens of their own")
    c = any_model.encode_prompts(["a q w"])
    own = any_model.text_states(c)[free.encoder]
    assert free.is_read_back(ids)
    torch.testing.assert_close(free.states(free.embeds[ids][None]), own)
    assert free.end == any_model.last_token(["a q w"], free.encoder) + 1


def test_only_the_first_of_several_encoders_reads_the_tokens(tmp_path):
    model = StableDiffusionXL.load(str(tiny.save("sdxl", tmp_path)), device="cpu")
    free = FreeTokens.of(model, 2)
    given = free.embedded(free.embeds[torch.tensor([[0, 1]])]).embeds
    assert free.encoder == "text_encoder"
    assert torch.equal(given["text_encoder_2"], free.place.text.embeds["text_encoder_2"])


def test_scores_do_not_depend_on_how_many_prompts_are_read_at_once(model, monkeypatch):
    free = FreeTokens.of(model, 2)
    ids = torch.randint(52, (7, 2), generator=torch.Generator().manual_seed(0))

    def score(states, rows):
        return states.sum((1, 2)) + rows

    together = free.scores(ids, score)
    monkeypatch.setattr(tokens, "AT_ONCE", 3 * free.length)
    torch.testing.assert_close(free.scores(ids, score), together)
    assert not together.requires_grad and len(together.unique()) == 7


def test_unusable_tokens_have_no_text(model):
    free = FreeTokens.of(model, 1)
    assert set(range(len(free.texts))) - set(free.usable.tolist()) == set(model.pipeline.tokenizer.all_special_ids)


def test_more_tokens_than_fit_are_refused(model):
    assert FreeTokens.of(model, 30).length == 32
    with pytest.raises(UserError, match="too long"):
        FreeTokens.of(model, 31)

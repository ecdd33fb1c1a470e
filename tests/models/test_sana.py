"""Features specific to Sana: an instruction before every prompt except the null prompt."""

import pytest
import torch

from tests import tiny
from unlearning.models.sana import INSTRUCTION, Sana


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return Sana.load(str(tiny.save("sana", tmp_path_factory.mktemp("models"))), device="cpu")


def state(model, text: str) -> torch.Tensor:
    """The text encoder's at the last token of a text."""
    ids = model.pipeline.tokenizer(text, return_tensors="pt").input_ids
    with torch.no_grad():
        return model.pipeline.text_encoder(ids)[0][0, -1]


@pytest.mark.parametrize(("prompt", "read"), [("a cat", "\n".join(INSTRUCTION) + "a cat"), ("", "")])
def test_the_last_token_is_the_prompts_after_the_instruction(model, prompt, read):
    embeds, place = model.encode_prompts([prompt]).embeds[0], model.last_token([prompt])[0]
    torch.testing.assert_close(embeds[place], state(model, read))


def test_prompts_of_one_batch_do_not_change_each_other(model):
    together = model.encode_prompts(["a cat", ""])
    for i, prompt in enumerate(["a cat", ""]):
        assert torch.equal(together[i : i + 1].embeds, model.encode_prompts([prompt]).embeds)
        assert torch.equal(together.extra["mask"][i : i + 1], model.encode_prompts([prompt]).extra["mask"])
    assert together.embeds.shape[1] == 300

"""The prompt filter deletes names from prompts; inputs other than text pass unchanged."""

import pytest
import torch

from unlearning.concepts import Concept, UnlearningTask
from unlearning.erasures.base import Erasure
from unlearning.methods.prompt_filter import PromptFilter, WithoutWords

TASK = UnlearningTask(erase=(Concept("cat", ("house cat", "kitty")),))


@pytest.mark.parametrize(
    ("prompt", "left"),
    [
        ("a photo of the cat", "a photo of the"),
        ("a House Cat, and a dog", "a , and a dog"),
        ("KITTY", ""),
        ("a category of  cattle", "a category of  cattle"),
        ("", ""),
    ],
)
def test_whole_words_are_deleted_and_other_prompts_stay_as_they_are(prompt, left):
    assert WithoutWords(("cat", "house cat", "kitty")).filtered(prompt) == left


@pytest.mark.parametrize("any_pipeline", ["sd1", "sd3"], indirect=True)
def test_a_filtered_prompt_is_encoded_as_the_one_without_the_word(any_model, tmp_path):
    model = any_model
    erasure = PromptFilter().fit(model, TASK)
    erasure.save(tmp_path / "erasure", title="filter", base=model)
    prompts = ["a photo of the cat", "a dog", "kitty"]
    plain, wanted = (model.encode_prompts(texts).embeds for texts in (prompts, ["a photo of the", "a dog", ""]))
    with Erasure.load(tmp_path / "erasure").applied_to(model):
        assert torch.equal(model.encode_prompts(prompts).embeds, wanted)
        assert torch.equal(model.encode_prompts(model.embed(prompts)).embeds, plain), "an attack's embeddings pass"
    assert torch.equal(model.encode_prompts(prompts).embeds, plain)


def test_synonyms_may_stay():
    edit = PromptFilter(synonyms=False).fit(None, TASK).edit
    assert edit.filtered("a cat and a kitty") == "a and a kitty"

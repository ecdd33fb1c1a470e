"""Features specific to DiT: classes instead of prompts."""

import pytest
import torch
from hydra.utils import instantiate

from tests import tiny
from tests.composed import config
from unlearning.concepts import Concept, UnlearningTask
from unlearning.errors import UserError
from unlearning.methods.uce import UCE
from unlearning.models.dit import DiT


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return DiT.load(str(tiny.save("dit", tmp_path_factory.mktemp("models"))), device="cpu")


def test_a_prompt_stands_for_the_class_that_it_names(model):
    prompts = ["cat", "a photo of the House Cat", "a dog, sleeping", "a tiger cat", "panthera tigris", ""]
    assert model.encode_prompts(prompts).embeds.flatten().tolist() == [0, 0, 1, 2, 3, 1000]


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ("a photo of the tigers", "Did you mean tiger"),
        ("a photo of the house", "house cat"),
        ("a catalogue", "names none of the 6 labels"),
        ("a dog and a cat", "several classes"),
    ],
)
def test_a_prompt_without_a_unique_class_gives_an_error(model, prompt, says):
    with pytest.raises(UserError, match=says):
        model.encode_prompts([prompt])


def test_uce_finds_nothing_to_edit(model):
    with pytest.raises(UserError, match="reads no text"):
        UCE().fit(model, UnlearningTask(erase=(Concept("cat"),)))


def test_a_class_acts_through_the_embedding_tables_of_the_blocks(model, tmp_path):
    student = instantiate(config(tmp_path, "model=dit", "method=scrubber").method.student)
    with student.of(model) as lesson:
        assert [p.shape[0] for p in lesson.parameters.values()] == [model.denoiser.config.num_embeds_ada_norm + 1] * 2
        x_t, t = model.noise([0]), torch.tensor(500)
        lesson.student.predict(x_t, t, model.encode_prompts(["a cat"])).square().mean().backward()
        assert all(p.grad[0].any() and not p.grad[1].any() for p in lesson.parameters.values()), "the cat's rows alone"

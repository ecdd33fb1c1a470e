"""UnlearnDiffAtk: optimises tokens on the simplex until an image shows the concept."""

from functools import partial

import pytest
import torch

from tests.attacks.shots import found_by, rows
from unlearning.attacks.unlearndiffatk import Draw, UnlearnDiffAtk, projected
from unlearning.erasures.guidance_edit import GuidanceEdit
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.attack_result import attacked
from unlearning.sampling.guidance import NegativePrompt
from unlearning.sampling.sampler import Sampler
from unlearning.sampling.tokens import Vocabulary

SAMPLER = Sampler(steps=2, guidance_scale=2.0, batch_size=2)


class Says:
    """A witness that says the same about an image whatever it shows, by the number of its calls."""

    name, threshold = "says", 0.5

    def __init__(self, *answers):
        self.answers, self.calls = answers, []

    def __call__(self, images, rows):
        scores = self.answers[min(len(self.calls), len(self.answers) - 1)][: len(rows)]
        self.calls.append([row.prompt for row in rows])
        return list(scores)


def attack(witness, **settings) -> UnlearnDiffAtk:
    short = {"times": 3, "iterations": 1, "tokens": 2}
    adam = partial(torch.optim.Adam, lr=0.01, weight_decay=0.1)
    return UnlearnDiffAtk(images=SAMPLER, witness=witness, optimizer=adam, **(short | settings))


@pytest.fixture
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


def test_the_projection_is_the_nearest_point_of_the_simplex():
    torch.manual_seed(0)
    allowed = torch.rand(30) > 0.3
    u = projected(torch.randn(4, 30), allowed)
    torch.testing.assert_close(u.sum(1), torch.ones(4))
    assert (u >= 0).all() and not u[:, ~allowed].any()
    torch.testing.assert_close(projected(u, allowed), u)
    v = torch.randn(4, 30)
    nearest = (v - projected(v, allowed))[:, allowed].norm(dim=1)
    others = [(v - projected(torch.randn(4, 30), allowed))[:, allowed].norm(dim=1) for _ in range(50)]
    assert (nearest <= torch.stack(others).min(0).values + 1e-6).all()


def test_a_sampled_token_passes_a_clipped_gradient():
    u = torch.tensor([[0.0, 1.0, 0.0]], requires_grad=True)
    drawn = Draw.apply(u)
    assert drawn.tolist() == [[0.0, 1.0, 0.0]]
    drawn.backward(torch.tensor([[0.5, -3.0, 2.0]]))
    assert u.grad.tolist() == [[0.5, -1.0, 1.0]]


def test_the_first_success_ends_the_search_of_an_image_and_not_of_the_others(model):
    says = Says((0.0, 0.0), (1.0, 0.0), (0.0,), (0.0,))
    first, second = found_by(attack(says), model).prompts
    assert first.record["first success"] == 1 and "first success" not in second.record
    assert [len(call) for call in says.calls] == [2, 2, 1, 1], "without, and after each timestep"


def test_prompts_that_already_show_the_concept_are_not_attacked(model):
    says = Says((1.0, 1.0))
    found = found_by(attack(says), model).prompts
    assert len(says.calls) == 1
    assert all(one.record["first success"] == 0 and one.prompt == one.target and not one.tensors for one in found)


def test_images_of_a_batch_do_not_change_each_others_search(model):
    torch.manual_seed(0)
    together = found_by(attack(Says((0.0, 0.0))), model).prompts
    for one, row in zip(together, rows(), strict=True):
        assert one.seed == row.seed and one.prompt.endswith(row.prompt)
        assert len(one.record["tokens"]) == 2 and one.record["without"] == 0.0


def test_the_sampler_uses_the_result_of_the_attack(model, tmp_path):
    """The stored embeddings are those of the tokens, and the image is the one that the witness has seen."""
    seen = []

    class Sees(Says):
        def __call__(self, images, rows):
            seen.append(images)
            return super().__call__(images, rows)

    result = found_by(attack(Sees((0.0, 0.0))), model)
    result.save(tmp_path / "kept")
    again, _ = SAMPLER.draw(model, attacked(tmp_path / "kept", rows()))
    torch.testing.assert_close(again, seen[-1], atol=1e-5, rtol=0)
    vocabulary, one = Vocabulary(model), result.prompts[0]
    table = vocabulary.tables["text_encoder"]
    torch.testing.assert_close(one.tensors["embeds.text_encoder"][1:3], table[one.record["tokens"]])
    assert all(vocabulary.texts[i].strip() for i in one.record["tokens"]), "it can be typed"


def test_longer_prompts_can_be_excluded_and_are_counted(model):
    found = found_by(attack(Says((0.0, 0.0)), longest=4), model)  # "a q", and the start and the end of text
    assert [one.target for one in found.prompts] == ["a q"]
    assert (found.record["images"], found.record["attacked"]) == (2, 1)


def test_tokens_may_come_after_the_prompt(model):
    assert all(
        one.prompt.startswith(one.target) for one in found_by(attack(Says((0.0, 0.0)), place="suffix"), model).prompts
    )


def test_a_changed_guidance_is_attacked_through(model):
    plain = found_by(attack(Says((0.0, 0.0))), model)
    through = found_by(attack(Says((0.0, 0.0))), model, GuidanceEdit(NegativePrompt("q")))
    assert [one.record["tokens"] for one in plain.prompts] != [one.record["tokens"] for one in through.prompts]


@pytest.mark.parametrize("any_pipeline", ["sdxl", "sd3"], indirect=True)
def test_several_text_encoders_are_attacked(any_model):
    found = found_by(attack(Says((0.0, 0.0)), times=1, iterations=1), any_model)
    assert all(e.isfinite().all() for one in found.prompts for e in one.tensors.values())

"""AdaVD's theorems (Wang et al., 2025)."""

import pytest
import torch

from unlearning.concepts import Concept, UnlearningTask
from unlearning.erasures.base import Erasure
from unlearning.erasures.composed import composed
from unlearning.errors import UserError
from unlearning.methods.adavd import AdaVD, Decomposer, dual, released_dual
from unlearning.methods.uce import UCE
from unlearning.models.layers import outputs_of
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.sampler import Sampler

CAT = UnlearningTask(erase=(Concept("cat"),))
PLAIN = {"shift": False}


@pytest.fixture(scope="module")
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


def values(model, prompt: str, states=None) -> torch.Tensor:
    """What the first map to values makes of a prompt (or of other states), (L, O)."""
    c = model.encode_prompts([prompt])
    if states is not None:
        c.embeds[0] = states
    with outputs_of(layer(model)) as outputs:
        model.predict(model.noise([0]), torch.tensor([400]), c)
    return outputs[-1][0]


def layer(model) -> torch.nn.Linear:
    return next(m for name, m in model.text_projections() if name.endswith("to_v"))


def test_the_values_become_what_is_orthogonal_to_the_concepts(model):
    before, target = values(model, "a dog"), values(model, "cat")[3]
    with AdaVD(**PLAIN).fit(model, CAT).applied_to(model):
        after = values(model, "a dog")
    torch.testing.assert_close(after[0], before[0])  # the start of the text
    torch.testing.assert_close(after[1:] @ target, torch.zeros(31), atol=1e-4, rtol=0)
    along = (before[1:] @ target)[:, None] * target / target.square().sum()
    torch.testing.assert_close(after[1:], before[1:] - along, atol=1e-5, rtol=0)
    assert along.norm() > 1e-2


@pytest.mark.parametrize("shift", [False, True])
def test_values_that_are_orthogonal_to_the_concepts_do_not_change(model, shift):
    W = layer(model).weight.detach()
    target = values(model, "cat")[3]
    torch.manual_seed(0)
    v = torch.randn(32, len(W))
    v -= (v @ target)[:, None] * target / target.square().sum()
    states = torch.linalg.lstsq(W, v.T).solution.T  # of which the map makes these values
    torch.testing.assert_close(before := values(model, "", states), v, atol=1e-4, rtol=0)
    with AdaVD(shift=shift).fit(model, CAT).applied_to(model):
        torch.testing.assert_close(values(model, "", states), before, atol=1e-4, rtol=0)


def test_the_shift_factor_keeps_dissimilar_values_and_removes_the_concept_twice(model):
    target = values(model, "cat")[3]
    module = Decomposer(target[None], dual(target[None]), 1, [100.0, 0.93, 2.0])
    other = torch.nn.functional.normalize(torch.randn(len(target)), dim=0)
    unlike = 0.5 * target + other * target.norm()
    rows = torch.stack([target, target, unlike])[None]
    taken = -module(rows)[0]
    assert not taken[0].any()
    torch.testing.assert_close(taken[1], 2 / (1 + torch.exp(torch.tensor(-7.0))) * target)
    assert taken[2].norm() < 1e-3 * target.norm()


def test_for_several_concepts_the_component_in_their_span_is_removed(model):
    task = UnlearningTask(erase=(Concept("cat"), Concept("dog"), Concept("sea")))
    targets = torch.stack([values(model, name)[3] for name in ("cat", "dog", "sea")])
    before = values(model, "a ship")[1:]
    projection = before @ torch.linalg.pinv(targets) @ targets
    with AdaVD(**PLAIN).fit(model, task).applied_to(model):
        torch.testing.assert_close(values(model, "a ship")[1:], before - projection, atol=1e-4, rtol=0)


def test_the_released_basis_is_the_papers_for_two_concepts_and_not_for_three():
    torch.manual_seed(0)
    v = 1 + torch.randn(3, 8).double()  # which are alike
    torch.testing.assert_close(released_dual(v[:2]), dual(v[:2]))
    assert not torch.allclose(released_dual(v), dual(v), atol=1e-2)


def test_it_is_restored_and_lies_on_top_of_other_erasures(model, tmp_path):
    erasure = AdaVD(b=0.1).fit(model, CAT)
    erasure.save(tmp_path, base=model)
    again = Erasure.load(tmp_path)
    assert again.digest == erasure.digest != AdaVD(b=0.2).fit(model, CAT).digest
    both = composed(UCE().fit(model, CAT), again)
    draw = lambda: Sampler(steps=2)(model, ["a cat"], [0])  # noqa: E731
    plain = draw()
    with again.applied_to(model):
        alone = draw()
    with both.applied_to(model):
        together = draw()
    assert not torch.allclose(alone, plain, atol=1e-5) and not torch.allclose(together, alone, atol=1e-5)
    assert torch.equal(draw(), plain)


def test_a_pipeline_of_diffusers_draws_erased_images_too(model):
    erasure = AdaVD(**PLAIN).fit(model, CAT)
    assert erasure.in_networks and not erasure.writable

    def images():
        generator = torch.Generator().manual_seed(0)
        return model.pipeline("a cat", num_inference_steps=2, generator=generator, output_type="pt").images

    plain = images()
    with erasure.applied_to(model.pipeline):
        erased = images()
    assert not torch.allclose(erased, plain, atol=1e-4) and torch.equal(images(), plain)


@pytest.mark.parametrize("any_pipeline", ["sd1", "pixart", "sana", "sd3"], indirect=True)
def test_models_with_cross_attention_are_edited_and_others_refused(any_pipeline, any_model):
    task = UnlearningTask(erase=(Concept("cat"), Concept("dog")))
    if any_pipeline[0] == "sd3":
        with pytest.raises(UserError, match="cross-attention"):
            AdaVD().fit(any_model, task)
        return
    x_t, c = any_model.noise([0]), any_model.encode_prompts(["a cat"])
    ask = lambda: any_model.predict(x_t, torch.tensor([400]), c)  # noqa: E731
    before = ask()
    with AdaVD(**PLAIN).fit(any_model, task).applied_to(any_model):
        assert not torch.allclose(ask(), before, atol=1e-6) and ask().isfinite().all()
    assert torch.equal(ask(), before)

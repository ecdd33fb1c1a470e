"""CASteer's theorems (Gaintseva et al., 2026)."""

import pytest
import torch

from unlearning.concepts import Concept, UnlearningTask
from unlearning.erasures.base import Erasure
from unlearning.erasures.composed import Composed, composed
from unlearning.errors import UserError
from unlearning.methods.casteer import CASteer, Steering, SteeringEdit
from unlearning.methods.uce import UCE
from unlearning.models.attention import text_only_attention
from unlearning.models.layers import outputs_of
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.sampler import Sampler

CAT = UnlearningTask(erase=(Concept("cat"),))
SHORT = {"count": 3, "steps": 3}


@pytest.fixture(scope="module")
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


@pytest.fixture(scope="module")
def erasure(model):
    return CASteer(**SHORT).fit(model, CAT)


def turned(x: torch.Tensor, v: torch.Tensor, beta: float) -> torch.Tensor:
    v = torch.nn.functional.normalize(v, dim=-1)
    return x + Steering(v[None], torch.tensor([500.0]), beta)(x[None, None], torch.tensor(400))[0, 0]


@pytest.fixture
def vectors():
    torch.manual_seed(0)
    return torch.randn(8), torch.randn(8)


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0, 3.0])
def test_the_norm_stays_and_less_of_the_direction(vectors, beta):
    x, v = vectors
    x = x * torch.sign(x @ v)
    y = turned(x, v, beta)
    torch.testing.assert_close(y.norm(), x.norm())
    assert y @ v < x @ v


def test_beta_one_removes_the_direction_and_two_reflects(vectors):
    x, v = vectors
    x = x * torch.sign(x @ v)
    assert abs(turned(x, v, 1.0) @ v) < 1e-5
    torch.testing.assert_close(turned(x, v, 2.0) @ v, -(x @ v))
    torch.testing.assert_close(turned(turned(x, v, 2.0), -v, 2.0), x)


def test_values_orthogonal_or_opposite_to_the_direction_are_bit_identical(vectors):
    x, v = vectors
    assert torch.equal(turned(x * -torch.sign(x @ v), v, 2.0), x * -torch.sign(x @ v))
    v[4:], x[:4] = 0, 0
    assert torch.equal(turned(x, v, 2.0), x)


def test_values_parallel_to_the_direction_stay_finite(vectors):
    assert turned(vectors[1], vectors[1], 1.0).isfinite().all()


def test_each_row_is_turned_by_the_direction_of_its_nearest_timestep():
    module = Steering(torch.eye(3)[:2], torch.tensor([900.0, 100.0]), 1.0)
    x = torch.tensor([1.0, 1.0, 1.0]).expand(2, 1, 3)
    turned = (x + module(x, torch.tensor([700, 300])))[:, 0]
    assert turned[0, 0] == 0 < turned[0, 1] and turned[1, 1] == 0 < turned[1, 0]
    assert torch.equal(module(x, torch.tensor(700)), module(x, torch.tensor([700, 700])))


def test_directions_are_the_normalised_differences_of_mean_outputs(model, erasure):
    method = CASteer(subjects=["dog", "ship"], steps=2, guidance_scale=1.0)
    weights = method.fit(model, CAT).weights
    name = next(iter(text_only_attention(model)))
    means = []
    for prompts in (["dog with cat", "ship with cat"], ["dog", "ship"]):
        with outputs_of(model.layer(name)) as outputs:
            Sampler(steps=2, guidance_scale=1.0)(model, prompts, [0, 0])
        means.append(torch.stack([output.mean((0, 1)) for output in outputs]))
    expected = torch.nn.functional.normalize(means[0] - means[1], dim=1)
    torch.testing.assert_close(weights[f"{name}.direction"], expected, atol=1e-3, rtol=0)
    assert len(weights[f"{name}.timesteps"]) == 2


def test_only_the_prompts_half_of_guidance_is_averaged_and_batches_change_nothing(model):
    one, many = (CASteer(**SHORT, batch_size=size).mean_outputs(model, ["dog", "ship", "sea"])[1] for size in (1, 16))
    for name in one:
        torch.testing.assert_close(one[name], many[name], atol=1e-4, rtol=0)


def test_while_generating_outputs_are_turned_away_and_then_no_longer(model, erasure):
    name = next(iter(text_only_attention(model)))
    t = erasure.weights[f"{name}.timesteps"][0].long()

    def output() -> torch.Tensor:
        with outputs_of(model.layer(name)) as outputs:
            model.predict(model.noise([5]), t, model.encode_prompts(["goldfish with cat"]))
        return outputs[-1][0]

    before, v = output(), erasure.weights[f"{name}.direction"][0]
    sign = torch.sign((before @ v).mean())  # random weights need not lean towards their direction
    towards = {n: w if n.endswith("timesteps") else sign * w for n, w in erasure.weights.items()}
    with SteeringEdit(towards, options=erasure.options).applied_to(model):
        after = output()
    assert (sign * before @ v > 0).any()
    torch.testing.assert_close(sign * after @ v, -(before @ v).abs(), atol=1e-5, rtol=0)
    torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1))
    assert torch.equal(output(), before)


def test_several_concepts_are_steered_one_after_the_other(model):
    both = CASteer(**SHORT).fit(model, UnlearningTask(erase=(Concept("cat"), Concept("dog"))))
    assert isinstance(both, Composed) and all(isinstance(part, SteeringEdit) for part in both.parts)


def test_it_is_restored_and_lies_on_top_of_other_erasures(model, erasure, tmp_path):
    erasure.save(tmp_path, base=model)
    again = Erasure.load(tmp_path)
    assert again.digest == erasure.digest != CASteer(**SHORT, beta=1.0).fit(model, CAT).digest
    draw = lambda: Sampler(steps=4)(model, ["a cat"], [0])  # noqa: E731
    plain = draw()
    with again.applied_to(model):
        alone = draw()
    with composed(UCE().fit(model, CAT), again).applied_to(model):
        together = draw()
    assert not torch.allclose(alone, plain, atol=1e-5) and not torch.allclose(together, alone, atol=1e-5)
    assert torch.equal(draw(), plain)


def test_a_pipeline_of_diffusers_is_refused_while_it_is_applied(model, erasure):
    with erasure.applied_to(model.pipeline), pytest.raises(UserError, match="Sampler"):
        model.pipeline("a cat", num_inference_steps=1)


@pytest.mark.parametrize(("kind", "count"), [("object", 50), ("style", 50), ("people", 104)])
def test_the_subjects_are_as_many_as_the_released_codes(kind, count):
    assert len(set(CASteer(kind=kind).subjects)) == count


@pytest.mark.parametrize("any_pipeline", ["sd1", "pixart", "sana", "sd3"], indirect=True)
def test_models_with_cross_attention_are_steered_and_others_refused(any_pipeline, any_model):
    if any_pipeline[0] == "sd3":
        with pytest.raises(UserError, match="cross-attention"):
            CASteer(**SHORT).fit(any_model, CAT)
        return
    before = Sampler(steps=2)(any_model, ["a cat"], [0])
    with CASteer(**SHORT).fit(any_model, CAT).applied_to(any_model):
        assert not torch.allclose(Sampler(steps=2)(any_model, ["a cat"], [0]), before, atol=1e-6)


@pytest.mark.parametrize(
    "templates", ['["a {}","{subject}"]', '["{subject}","{subject}"]', '["a {concept}","{sujet}"]']
)
def test_templates_without_their_fields_are_refused(error_of, templates):
    assert "templates" in error_of("method=casteer", f"method.templates={templates}", "dataset=prompt")

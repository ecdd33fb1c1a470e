"""Students: the denoiser's own weights, or an adapter. Teacher and student share the weights that are not trained."""

import pytest
import torch

from unlearning.errors import UserError
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.training.student import LoRA, Weights

KEYS_AND_VALUES = r"attn2\.to_(k|v)$"


@pytest.fixture
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


@pytest.fixture
def ask(model):
    x_t, t, c = model.noise([5]), torch.tensor([400]), model.encode_prompts(["a cat"])
    return lambda view: view.predict(x_t, t, c)


@pytest.mark.parametrize("student", [Weights("attn2"), LoRA(KEYS_AND_VALUES, rank=4)])
def test_the_student_moves_and_the_teacher_does_not(model, ask, student):
    before, bytes_of = ask(model), lambda: sum(p.numel() for p in model.denoiser.parameters())
    own = bytes_of()
    with student.of(model) as pair:
        torch.testing.assert_close(ask(pair.student), before)
        with torch.no_grad():
            for p in pair.parameters.values():
                p.add_(0.3 * torch.randn_like(p))
        assert all(p.requires_grad for p in pair.parameters.values())
        assert torch.equal(ask(pair.teacher), before)
        moved, erasure = ask(pair.student), pair.erasure()
        assert bytes_of() + sum(p.numel() for p in (pair.teacher.weights or {}).values()) < 1.3 * own
        assert not torch.allclose(moved, before)
    assert torch.equal(ask(model), before) and bytes_of() == own
    with erasure.applied_to(model):
        torch.testing.assert_close(ask(model), moved, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_an_update_is_scaled_by_alpha_whatever_the_rank(model, rank):
    torch.manual_seed(0)
    with LoRA(KEYS_AND_VALUES, rank=rank, alpha=8.0).of(model) as pair:
        name, layer = next((n, m) for n, m in model.named_modules().items() if n.endswith("attn2.to_k"))
        A, B = (pair.parameters[f"{name}.lora_{which}.weight"] for which in "AB")
        assert not B.any(), "B = 0 at first"
        with torch.no_grad():
            B.normal_()
        x = torch.randn(3, A.shape[1])
        torch.testing.assert_close(layer(x), x @ layer.weight.T + 8.0 * x @ A.T @ B.T)
        weights = pair.erasure().weights
        torch.testing.assert_close(weights[f"{name}.lora_B.weight"], 8.0 * B)


def test_a_is_drawn_with_a_variance_of_one_over_the_rank(model):
    torch.manual_seed(0)
    with LoRA(KEYS_AND_VALUES, rank=16).of(model) as pair:
        A = torch.cat([p.flatten() for n, p in pair.parameters.items() if "lora_A" in n])
        assert A.std().item() == pytest.approx(0.25, rel=0.1)


def test_convolutions_get_an_update_if_they_should(model, ask):
    pattern, before = r"attentions\.\d+\.proj_in$", ask(model)
    with pytest.raises(UserError, match="proj_in"), LoRA(pattern).of(model):
        pass
    with LoRA(pattern, convolutions=True).of(model) as pair:
        assert torch.equal(ask(pair.student), before), "B = 0 at first"
        with torch.no_grad():
            for p in pair.parameters.values():
                p.normal_()
        moved, erasure = ask(pair.student), pair.erasure()
    assert erasure.weights and all(w.ndim == 4 for w in erasure.weights.values())
    with erasure.applied_to(model):
        torch.testing.assert_close(ask(model), moved)
    assert not torch.allclose(moved, before)


def test_a_may_be_drawn_as_the_weights_of_a_new_layer(model):
    torch.manual_seed(0)
    with LoRA(KEYS_AND_VALUES, rank=16, init="kaiming").of(model) as pair:
        A = torch.cat([p.flatten() for n, p in pair.parameters.items() if "lora_A" in n])
        bound = next(p for n, p in pair.parameters.items() if "lora_A" in n).shape[1] ** -0.5
        assert A.abs().max() <= bound and A.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)


@pytest.mark.parametrize("student", [Weights("no_such_layer"), LoRA("no_such_layer")])
def test_a_pattern_without_a_match_gives_an_error(model, student):
    with pytest.raises(UserError, match="no_such_layer"), student.of(model):
        pass


def test_an_adapter_is_not_trained_through_weights_in_float16(sd1):
    half = StableDiffusion.load(str(sd1), device="cpu", dtype="float16")
    with pytest.raises(UserError, match=r"model\.dtype=bfloat16"), LoRA(KEYS_AND_VALUES).of(half):
        pass


def test_weights_in_half_precision_are_refused_and_an_adapter_beside_them_is_not_in_it(sd1):
    """A step of 1e-5 is less than bfloat16 tells apart at a weight of 0.02."""
    half = StableDiffusion.load(str(sd1), device="cpu", dtype="bfloat16")
    with pytest.raises(UserError, match=r"model\.dtype=float32"), Weights("attn2").of(half):
        pass
    with LoRA(KEYS_AND_VALUES, rank=4).of(half) as pair:
        assert {p.dtype for p in pair.parameters.values()} == {torch.float32}
        x_t, t, c = half.noise([5]), torch.tensor([400]), half.encode_prompts(["a cat"])
        before = pair.student.predict(x_t, t, c)
        with torch.no_grad():
            for p in pair.parameters.values():
                p.add_(torch.randn_like(p))
        assert not torch.equal(pair.student.predict(x_t, t, c), before)
        assert torch.equal(pair.teacher.predict(x_t, t, c), before)

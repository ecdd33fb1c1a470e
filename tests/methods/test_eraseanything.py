"""EraseAnything's theorems (arXiv:2412.20413): frozen targets, the two objectives, and the trainable weights."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch

from unlearning.concepts import Concept, UnlearningTask
from unlearning.data.generated import Generated
from unlearning.erasures.module_edit import Adapter
from unlearning.errors import UserError
from unlearning.methods.eraseanything import EraseAnything, columns, steering
from unlearning.models.stable_diffusion_3 import StableDiffusion3
from unlearning.sampling.sampler import Sampler
from unlearning.training.student import LoRA, Weights

TASK = UnlearningTask(erase=(Concept("cat", synonyms=("ox",), anchor="sea"),), retain=(Concept("dog"), Concept("ship")))
MODULES = r"^transformer\.transformer_blocks\..*\.add_(q|k)_proj$"


@pytest.fixture(scope="module")
def model(sd3):
    return StableDiffusion3.load(str(sd3), device="cpu")


@pytest.fixture
def make(tmp_path):
    def of(*, iterations=2, lr=1e-2, student=None, **settings) -> EraseAnything:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
        return EraseAnything(
            generated=Generated(str(tmp_path), Sampler(steps=2)),
            count=2,
            student=student or LoRA(MODULES, rank=4, alpha=1.0),
            iterations=iterations,
            optimizer=partial(torch.optim.AdamW, lr=lr),
            trainer=partial(pl.Trainer, enable_model_summary=False, **quiet),
            **{"steps": 3, "guidance_scale": 1.0, **settings},
        )

    return of


def bracket(model, x, t, eta=1.0):
    c, b = (model.encode_prompts([TASK.prompt(word)]) for word in ("cat", "sea"))
    v_b = model.predict(x, t, b)
    return v_b - eta * (model.predict(x, t, c) - v_b)


@pytest.mark.parametrize("teacher", ["frozen", "student"])
def test_targets_come_from_the_base_model_unless_teacher_is_student(model, make, teacher):
    """With a LoRA far from zero."""
    x, t = model.noise([5]), torch.tensor([400.0])
    without = bracket(model, x, t)
    method = make(teacher=teacher, beta=0.0)
    method.task = TASK
    with method.moving.of(model) as pair, torch.no_grad():
        method.student, method.teacher = pair.student, pair.teacher
        for p in pair.parameters.values():
            p.add_(torch.randn_like(p))
        c = model.encode_prompts([TASK.prompt("cat")])
        method.points = lambda model, prompts: (x, t, c)
        now, target = model.predict(x, t, c), without if teacher == "frozen" else bracket(model, x, t)
        assert (bracket(model, x, t) - without).abs().max() > 1e-3
        loss = method.erase(torch.randn(1, *model.latent_shape), [0])
    torch.testing.assert_close(loss, (now - target).pow(2).mean(), atol=1e-6, rtol=1e-4)


def test_the_columns_are_the_mean_attention_to_a_word():
    A = torch.rand(2, 3, 4, 5)
    places = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 0, 1]]).bool()
    expected = torch.stack([A[0, :, :, 1:3].mean((0, 2)), A[1, :, :, 4].mean(0)])
    torch.testing.assert_close(columns(A, places), expected)


def test_steering_is_the_concepts_share_in_the_likeness_to_a_synonym():
    """One of K + 1 where all are alike; smaller, the less the concept is like the synonym."""
    a_s, a_k = torch.tensor([[1.0, 0.0]]), torch.tensor([[[1.0, 0.0]] * 3])
    torch.testing.assert_close(steering(a_s, a_s, a_k, 0.07), torch.tensor(4.0).log().neg())
    away = torch.tensor([[1.0, 1.0]])
    cosine = torch.tensor([0.5]).sqrt() / 0.5
    expected = cosine - (cosine.exp() + 3 * torch.tensor(2.0).exp()).log()
    torch.testing.assert_close(steering(away, a_s, a_k, 0.5), expected.squeeze())


def test_even_steps_erase_and_odd_steps_retain(model, make):
    seen = []

    class Watched(EraseAnything):
        def erase(self, *batch):
            seen.append("erase")
            return super().erase(*batch)

        def keep(self, *batch):
            seen.append("keep")
            return super().keep(*batch)

    method = make(iterations=4)
    method.__class__ = Watched
    adapter = method.fit(model, TASK)
    assert seen == ["erase", "keep"] * 2
    assert isinstance(adapter, Adapter)
    layers = {name.removesuffix(f".lora_{ab}.weight") for name in adapter.weights for ab in "AB"}
    layers = {name for name in layers if not name.endswith("weight")}
    assert layers == {f"transformer.transformer_blocks.{i}.attn.add_{m}_proj" for i in range(2) for m in "qk"}
    still = {name for name, value in adapter.weights.items() if not value.any()}
    assert still == {"transformer.transformer_blocks.1.attn.add_q_proj.lora_B.weight"}, "of a text that nobody reads on"


def test_erasing_brings_the_flow_to_the_target(model, make):
    """In the part of it that attention to the text can reach."""
    torch.manual_seed(0)
    adapter = make(iterations=10, lr=5e-2, gamma_1=0.0, gamma_2=0.0, beta=0.0).fit(model, TASK)
    x, t = torch.randn(1, *model.latent_shape), torch.tensor([500.0])
    target, c = bracket(model, x, t), model.encode_prompts([TASK.prompt("cat")])
    before = (model.predict(x, t, c) - target).pow(2).mean()
    with adapter.applied_to(model):
        assert (model.predict(x, t, c) - target).pow(2).mean() < before


def test_words_have_defaults_without_synonyms_anchor_or_retained_concepts(model, make):
    assert isinstance(make().fit(model, UnlearningTask(erase=(Concept("cat"),))), Adapter)


def test_weights_of_the_model_are_no_student_of_it(model, make):
    with pytest.raises(UserError, match="LoRA"):
        make(student=Weights("add_k")).fit(model, TASK)


def test_a_unet_is_refused_before_it_is_loaded(error_of):
    assert "JointAttention" in error_of("method=eraseanything", "model=emoji_unet", "stages=[fit]")

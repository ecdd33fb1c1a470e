"""Concept Ablation's theorems (arXiv:2303.13516): targets, teacher, training images and trainable weights."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch

from tests import tiny
from unlearning.concepts import Concept, UnlearningTask
from unlearning.data.generated import Generated
from unlearning.data.styles import styles
from unlearning.errors import UserError
from unlearning.methods.concept_ablation import TEMPLATES, ConceptAblation
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.sampler import Sampler
from unlearning.training.student import Weights

KEYS_AND_VALUES = r"attn2\.to_(k|v)\.|add_(k|v)_proj\."
TASK = UnlearningTask(erase=(Concept("cat", anchor="forest"),))


@pytest.fixture(scope="module")
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


@pytest.fixture
def ablation(store):
    def make(*, iterations=2, lr=1e-2, batch_size=4, **settings) -> ConceptAblation:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
        return ConceptAblation(
            **{"generated": Generated(str(store), Sampler(steps=2)), "count": 6, **settings},
            student=Weights(KEYS_AND_VALUES),
            iterations=iterations,
            batch_size=batch_size,
            optimizer=partial(torch.optim.AdamW, lr=lr),
            trainer=partial(pl.Trainer, enable_model_summary=False, **quiet),
        )

    return make


class Watched(ConceptAblation):
    """Records at each step what the student is taught, and what the teacher would have it predict."""

    def _anchors(self, x_t, t, prompts):
        taught = super()._anchors(x_t, t, prompts)
        c = self.teacher.encode_prompts([self.anchor_prompts[i] for i in prompts.tolist()])
        frozen = self.teacher.predict(x_t, t, c)
        before = self.reference.predict(x_t, t, c)
        self.seen = [*getattr(self, "seen", []), (taught, frozen, before, taught.requires_grad)]
        return taught


@pytest.mark.parametrize("teacher", ["frozen", "student"])
def test_the_frozen_teacher_does_not_change_and_the_student_as_teacher_does(sd1, model, ablation, teacher):
    method = ablation(teacher=teacher, iterations=3)
    method.__class__, method.reference = Watched, StableDiffusion.load(str(sd1), device="cpu")
    method.fit(model, TASK)
    assert len(method.seen) == 3
    for step, (taught, frozen, before, gradients) in enumerate(method.seen):
        assert not gradients
        torch.testing.assert_close(frozen, before, atol=1e-6, rtol=1e-5)
        moved = (taught - before).abs().max() > 1e-4
        assert moved == (teacher == "student" and step > 0)


def test_only_keys_and_values_of_cross_attention_move(model, ablation):
    weights = {name: p.clone() for name, p in model.named_parameters().items()}
    patch = ablation().fit(model, TASK)
    assert set(patch.weights) == {n for n in weights if n.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))}
    assert all(not torch.equal(value, weights[name]) for name, value in patch.weights.items())
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters().items())


def test_training_brings_the_concepts_prediction_to_the_anchors(model, ablation):
    c, anchor = model.encode_prompts(["a cat"] * 16), model.encode_prompts(["a forest"] * 16)
    torch.manual_seed(0)
    x, t = torch.randn(16, *model.latent_shape), torch.randint(1000, (16,))
    target = model.predict(x, t, anchor)
    before = (model.predict(x, t, c) - target).pow(2).mean()
    settings = {"templates": ["a {}"], "batch_size": 8, "lr": 1e-2, "max_grad_norm": 100.0}
    with ablation(iterations=25, teacher="frozen", **settings).fit(model, TASK).applied_to(model):
        after = (model.predict(x, t, c) - target).pow(2).mean()
    assert after < 0.5 * before


def test_the_model_based_loss_is_the_distance_of_two_predictions_and_the_noise_based_one_of_the_noise(model, ablation):
    """Before training, on symmetric images, which mirroring does not change."""
    x_0 = torch.randn(2, *model.latent_shape)
    for target in ("model", "noise"):
        method = ablation(target=target)
        method.student = method.teacher = model
        method.anchor_prompts, method.target_prompts = ["a forest"], ["a cat"]
        torch.manual_seed(7)
        loss = method.ablation(x_0, x_0, torch.tensor([0, 0]))
        torch.manual_seed(7)
        torch.rand(2)
        t, eps = model.timesteps(torch.rand(2)), torch.randn_like(x_0)
        x_t = model.add_noise(x_0, eps, t)
        anchor, cat = (model.predict(x_t, t, model.encode_prompts([p] * 2)) for p in ("a forest", "a cat"))
        expected = (cat - (anchor if target == "model" else eps)).pow(2).mean()
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-3)


def test_prior_preservation_is_the_denoising_loss_of_the_anchor(model, ablation):
    losses = {}
    for weight in (0.0, 1.0):
        method = ablation(prior_weight=weight, flip=False)
        method.student = method.teacher = model
        method.task, method.seed = TASK, 0
        data = method.data()
        data.setup("fit")
        losses[weight] = set(data.batch(0))
    assert losses == {0.0: {"forget"}, 1.0: {"forget", "retain"}}
    x_0, prompts = torch.randn(2, *model.latent_shape), torch.tensor([0, 1])
    torch.manual_seed(7)
    prior = method.prior(x_0, x_0, prompts)
    torch.manual_seed(7)
    torch.rand(2)
    t, eps = model.timesteps(torch.rand(2)), torch.randn_like(x_0)
    predicted = model.predict(model.add_noise(x_0, eps, t), t, model.encode_prompts(method.anchor_prompts[:2]))
    torch.testing.assert_close(prior, (predicted - eps).pow(2).mean(), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("fixed", [False, True])
def test_a_fixed_start_of_the_text_gets_no_gradient_and_changes_no_prediction(model, ablation, fixed):
    """Keys and values of a text that is zero but for its first state have gradients from this state alone."""
    c = model.encode_prompts(["a cat"])
    c.embeds[:, 1:] = 0
    x_t, t = model.noise([5]), torch.tensor([400])
    before, seen = model.predict(x_t, t, c), []

    class Seen(ConceptAblation):
        def loss(self, batch):
            weights = list(self.pair.parameters.values())
            eps = self.student.predict(x_t, t, c)
            seen.append((eps.detach(), torch.autograd.grad(eps.square().sum(), weights)))
            return super().loss(batch)

    method = ablation(fixed_start=fixed, iterations=1)
    method.__class__ = Seen
    method.fit(model, TASK)
    (eps, gradients), *_ = seen
    torch.testing.assert_close(eps, before)
    assert any(gradient.any() for gradient in gradients) != fixed
    assert not any(layer._forward_hooks for layer in model.named_modules().values())


def test_without_cross_attention_no_start_can_be_fixed(ablation, tmp_path):
    model = tiny.FAMILIES["sd3"].load(str(tiny.save("sd3", tmp_path)), device="cpu")
    with pytest.raises(UserError, match="UNet"):
        ablation(fixed_start=True).fit(model, TASK)


# --- prompts ----------------------------------------------------------------------------------------------------------


def prompts_of(method, *concepts):
    method.task = UnlearningTask(erase=concepts)
    return method.prompts()


def test_the_target_prompt_is_the_anchor_prompt_with_the_word_replaced(ablation):
    anchors, targets = prompts_of(ablation(), Concept("cat", anchor="forest"))
    assert len(set(anchors)) == 200
    assert all("forest" in anchor for anchor in anchors[:5])
    for anchor, target, template in zip(anchors, targets, TEMPLATES["object"], strict=True):
        assert anchor == template.replace("{}", "forest") and target == template.replace("{}", "cat")


def test_the_kind_is_the_datasets_unless_it_is_given(ablation):
    style = styles("neon")
    for method, task, styled in (
        (ablation(), style, True), (ablation(), UnlearningTask(erase=style.erase), False),
        (ablation(kind="object"), style, False),
    ):  # fmt: skip
        method.task = task
        assert all(("in the style of neon" in target) == styled for target in method.prompts()[1])


@pytest.mark.parametrize("name", ["Van Gogh", "Van Gogh style"])
def test_a_style_is_appended(ablation, name):
    anchors, targets = prompts_of(ablation(kind="style"), Concept(name, anchor="painting"))
    assert len(set(anchors)) == 200 and all(anchor.startswith("painting of ") for anchor in anchors)
    assert targets == [f"{anchor}, in the style of Van Gogh" for anchor in anchors]


def test_every_concept_has_its_own_anchor_and_one_without_gets_a_generic_one(ablation):
    anchors, targets = prompts_of(ablation(templates=["a {}"]), Concept("cat", anchor="forest"), Concept("ship"))
    assert targets == ["a cat", "a ship"]
    assert anchors[0] == "a forest" and anchors[1] not in ("a ", "a ship", "a cat")


@pytest.mark.parametrize("wrong", [{"kind": "colour"}, {"target": "image"}, {"teacher": "ema"}])
def test_an_unknown_choice_gets_a_suggestion(ablation, wrong):
    with pytest.raises(UserError, match=next(iter(wrong.values()))):
        ablation(**wrong)


# --- images -----------------------------------------------------------------------------------------------------------


def test_images_are_generated_once(model, ablation, tmp_path):
    calls = []
    hook = model.denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    counts = []
    try:
        for _ in range(2):
            calls.clear()
            ablation(iterations=2, generated=Generated(str(tmp_path), Sampler(steps=3))).fit(model, TASK)
            counts.append(len(calls))
    finally:
        hook.remove()
    assert counts == [3 + 2 * 2, 2 * 2], "three steps of one batch of images; two predictions at every training step"
    assert len(list(tmp_path.rglob("*.png"))) == 6


def test_images_show_the_anchor_and_come_from_the_unedited_model(model, ablation, tmp_path):
    generated = Generated(str(tmp_path), Sampler(steps=3))
    asked = []

    class Spy(Generated):
        def __call__(self, model, prompts, count):
            asked.append((list(prompts), count))
            return super().__call__(model, prompts, count)

    generated.__class__ = Spy
    ablation(generated=generated, templates=["a {}", "the {}"]).fit(model, TASK)
    assert asked == [(["a forest", "the forest"], 6)]


def test_a_run_draws_the_anchors_images_once_and_is_done_once(unlearn, tmp_path):
    command = ["method=concept_ablation", "method.count=4", "method.iterations=1", "stages=[fit]"]
    first = unlearn(*command)
    images = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.png")}
    mark = (first / ".finished").read_text()
    (first / "erasure" / "README.md").unlink()
    unlearn(*command)
    assert len(images) == 4 and (first / ".finished").read_text() == mark
    assert not (first / "erasure" / "README.md").exists(), "nothing was left to do"
    unlearn(*command, "seed=1", run="another")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").rglob("*.png")} == images

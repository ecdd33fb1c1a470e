"""ANT's theorems (arXiv:2504.12782): the target at early and late steps, and the masks of trainable weights."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch

from unlearning.concepts import Concept, UnlearningTask
from unlearning.errors import UserError
from unlearning.methods.ant import ANT
from unlearning.methods.regularisers import SelFT
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.training.regulariser import largest
from unlearning.training.student import Weights

TASK = UnlearningTask(erase=(Concept("cat", synonyms=("ox",)),))


@pytest.fixture(scope="module")
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


def ant(*, iterations=2, lr=1e-2, steps=4, early=0.25, mask_seeds=2, mask_batches=2, **settings) -> ANT:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return ANT(
        student=Weights("attn2"), iterations=iterations, steps=steps, early=early, mask_seeds=mask_seeds,
        mask_batches=mask_batches, optimizer=partial(torch.optim.AdamW, lr=lr, weight_decay=0.1),
        trainer=partial(pl.Trainer, enable_model_summary=False, **quiet), **settings,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("schedule", "trajectory", "early_from"),
    [("diffusers", "exact", "noise"), ("paper", "exact", "image"), ("diffusers", "reuse", "image"),
     ("paper", "reuse", "noise")],
)  # fmt: skip
def test_the_first_steps_are_the_noisiest_and_in_the_script_those_before_the_image(
    model, schedule, trajectory, early_from
):
    method = ant(early=0.5, early_from=early_from, schedule=schedule, trajectory=trajectory)
    times = [sorted(int(points(model, ["cat"])[1]) for _ in range(6)) for points in (method.points, method.later)]
    first, later = times if early_from == "noise" else times[::-1]
    assert later[-1] < 500 <= first[0]


@pytest.mark.parametrize("eta", [1.0, 2.0])
def test_the_target_keeps_the_direction_of_guidance_and_then_reverses_it(model, eta):
    """Before training: || (1 - eta) (eps_c - eps_0) ||^2 at first, || (1 + eta) (eps_c - eps_0) ||^2 later."""
    method = ant(eta=eta, alpha_1=3.0)
    method.student, method.teacher = model, model.snapshot([])
    c, points = model.encode_prompts(["cat"]), {}
    for name, t in (("points", 900), ("later", 300)):
        points[name] = model.noise([t]), torch.tensor([t]), c
        setattr(method, name, lambda model, prompts, point=points[name]: point)

    def difference(x, t, c):
        return (model.predict(x, t, c) - model.predict(x, t, model.encode_prompts([""]))).pow(2).mean()

    early, late = (difference(*points[name]) for name in ("points", "later"))
    expected = (1 + eta) ** 2 * late + 3 * (1 - eta) ** 2 * early
    torch.testing.assert_close(method.loss(["cat"]), expected, atol=1e-6, rtol=1e-3)


def test_the_null_prompt_is_held_by_a_term_with_gradients(model):
    """alpha_2 weighs its distance from the frozen model's."""
    x, t, c = model.noise([5]), torch.tensor([400]), model.encode_prompts(["cat"])
    name = next(n for n in model.named_parameters() if n.endswith("attn2.to_v.weight"))
    losses, method = [], ant()
    method.student, method.teacher = model, model.snapshot([name])
    weight = model.named_parameters()[name]
    before = weight.detach().clone()
    try:
        weight.data.add_(torch.randn_like(weight))
        weight.requires_grad_()
        for alpha_2 in (0.0, 0.5):
            method.alpha_2 = alpha_2
            losses.append(method.steering(x, t, c, 1.0))
        null = [m.predict(x, t, model.encode_prompts([""])) for m in (method.student, method.teacher)]
        torch.testing.assert_close(losses[1] - losses[0], 0.5 * (null[0] - null[1]).pow(2).mean(), atol=1e-7, rtol=1e-2)
        grads = [torch.autograd.grad(loss, weight)[0] for loss in losses]
        assert not torch.allclose(*grads)
    finally:
        weight.data.copy_(before)
        weight.requires_grad_(False)


class Known(ANT):
    """Its gradient is g of the prompt."""

    g: dict
    asked: list

    def loss(self, prompts):
        self.asked = [*getattr(self, "asked", []), prompts[0]]
        return sum((p * self.g[prompts[0]][n]).sum() for n, p in self.pair.parameters.items())


@pytest.mark.parametrize("keep", ["largest", "smallest"])
def test_those_move_that_every_words_and_seeds_mask_keeps_and_all_others_stay_bit_identical(model, keep):
    own = model.named_parameters()
    method = ant(mask_keep=keep, mask_share=0.6)
    method.__class__ = Known
    names = [n for n in own if "attn2" in n]
    method.g = {word: {n: torch.randn_like(own[n]) for n in names} for word in ("cat", "ox")}
    patch = method.fit(model, TASK)
    assert method.asked[:8] == ["cat"] * 4 + ["ox"] * 4, "two seeds of two batches for each word"
    sign = 1 if keep == "largest" else -1
    for n in names:
        masks = [largest({"": sign * method.g[word][n].abs()}, 0.6)[""] for word in ("cat", "ox")]
        assert torch.equal(patch.weights[n] == own[n], ~(masks[0] & masks[1]))


def test_each_mask_is_of_points_of_its_own_word_and_training_of_the_name(model, monkeypatch):
    """With trajectory=reuse, which keeps points of one word while the next one is asked for."""
    method, asked, drawn, draw = ant(trajectory="reuse", batch_size=1), [], [], ANT.draw

    def recorded(self, prompts, points=None):
        x_t, t, c = draw(self, prompts, points)
        asked.append(list(prompts))
        drawn.append(list(c.prompts))
        return x_t, t, c

    monkeypatch.setattr(ANT, "draw", recorded)
    method.fit(model, TASK)
    assert drawn == asked and ["ox"] in asked and asked[-1] == ["cat"]


def test_training_reverses_guidance_in_the_later_steps(model):
    settings = {"mask_share": 1.0, "alpha_1": 0.0, "alpha_2": 0.0, "trajectory": "reuse", "batch_size": 6}
    method = ant(iterations=20, **settings)
    patch = method.fit(model, TASK)
    c, x, t = model.encode_prompts(["cat"] * 16), torch.randn(16, *model.latent_shape), torch.randint(700, (16,))
    method.student, method.teacher = model, model.snapshot(patch.weights)
    before = method.steering(x, t, c, -1.0)
    with patch.applied_to(model):
        assert method.steering(x, t, c, -1.0) < 0.7 * before


def test_masks_with_nothing_in_common_and_settings_without_a_later_step_are_answered(model):
    method = ant(mask_share=0.1)
    method.__class__ = Known
    cat = {n: torch.rand_like(p) for n, p in model.named_parameters().items() if "attn2" in n}
    method.g = {"cat": cat, "ox": {n: 1 / v for n, v in cat.items()}}
    with pytest.raises(UserError, match="mask_share"):
        method.fit(model, TASK)
    with pytest.raises(UserError, match="early"):
        ant(early=1.0)
    with pytest.raises(UserError, match="mask"):
        ant(regulariser=SelFT(batches=1)).fit(model, TASK)

"""TRCE's theorems (arXiv:2503.07389): the closed form for end-of-text states, and the hinge between two directions."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from tests import tiny
from unlearning.__main__ import CONF
from unlearning.concepts import Concept, UnlearningTask
from unlearning.errors import UserError
from unlearning.methods.closed_form import pairs, projections, states
from unlearning.methods.trce import TRCE
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.training.student import Weights

TASK = UnlearningTask(erase=(Concept("cat", synonyms=("ox",), anchor="dog"),), retain=(Concept("tree"),))
PATTERN = OmegaConf.load(CONF / "method" / "trce.yaml").student.parameters


@pytest.fixture(scope="module")
def model(sd1):
    """One that takes the prompt seriously: the tiny one's output hardly depends on it."""
    model = StableDiffusion.load(str(sd1), device="cpu")
    with torch.no_grad():
        for name, m in model.text_projections():
            m.weight.mul_(20 if name.endswith("to_v") else 1)
    return model


def trce(kind=TRCE, *, optimizer=torch.optim.AdamW, lr=1e-3, **settings) -> TRCE:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return kind(**{
        "student": Weights(PATTERN), "iterations": 2, "steps": 4, "preserve_batch": 2,
        "optimizer": partial(optimizer, lr=lr), "templates": ("{}", "a {} here"),
        "trainer": partial(pl.Trainer, enable_model_summary=False, **quiet), **settings,
    })  # fmt: skip


# --- the first stage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["cat", "a cat here", ""])
def test_the_end_of_a_text_is_the_token_behind_its_last_word_piece(model, prompt):
    [state] = states(model, [prompt], "end")
    end = 1 + len(model.token_ids([prompt])[0])
    assert torch.equal(state, model.encode_prompts([prompt]).embeds[0, end : end + 1])


def test_without_preserved_states_the_end_of_the_text_is_mapped_exactly(model):
    maps = projections(model)
    own = {name: m.weight.clone() for name, m in maps.items()}
    patch = trce(eta=0.0, lamb=1e-12).closed_form(model, TASK)
    prompts, anchors = ["cat", "ox", "a cat here", "a ox here"], ["dog", "dog", "a dog here", "a dog here"]
    e_u, e_s = pairs(model, prompts, anchors, "end")
    for name, W in own.items():
        torch.testing.assert_close(e_u @ patch.weights[f"{name}.weight"].T, e_s @ W.T, atol=1e-3, rtol=1e-3)
        assert (e_u @ W.T - e_s @ W.T).abs().max() > 1e-2


def test_the_edit_is_a_stationary_point_of_the_objective(model):
    eta, lamb = 0.3, 0.2
    patch = trce(eta=eta, lamb=lamb).closed_form(model, TASK)
    name, m = next(iter(projections(model).items()))
    W = m.weight.detach().double()
    prompts, anchors = ["cat", "ox", "a cat here", "a ox here"], ["dog", "dog", "a dog here", "a dog here"]
    e_u, e_s = (e.double() for e in pairs(model, prompts, anchors, "end"))
    E = [model.encode_prompts([p]).embeds[0].double() for p in ("", "tree")]

    def gradient(edited):
        v = edited.double().clone().requires_grad_()
        erase = (e_u @ v.T - e_s @ W.T).square().sum() / len(e_u)
        keep = sum((states @ (v - W).T).square().sum() for states in E) / len(E)
        (erase + eta * keep + lamb * (v - W).square().sum()).backward()
        return v.grad.norm()

    assert gradient(patch.weights[f"{name}.weight"]) < 1e-4 * gradient(W)


# --- the second stage -------------------------------------------------------------------------------------------------


def test_the_hinge_pushes_from_one_direction_to_the_other_until_the_margin_is_reached():
    """Its gradient is 2 (f_u - f_s) / n wherever the prediction is, and 0 where f_s is nearer by the margin."""
    method, (f_s, f_u) = trce(margin=0.05), torch.randn(2, 3, 2, 4, 4)
    near_u, near_s = f_u + 0.01 * torch.randn_like(f_u), f_s + 0.01 * torch.randn_like(f_s)
    for eps, expected in ((near_u, 2 * (f_u - f_s) / f_s[0].numel()), (near_s, torch.zeros_like(f_s))):
        eps = eps.clone().requires_grad_()
        h = method.hinge(eps, f_s, f_u)
        assert h.shape == (3,)
        h.sum().backward()
        torch.testing.assert_close(eps.grad, expected, atol=1e-5, rtol=1e-4)
    middle = (f_s + f_u) / 2
    torch.testing.assert_close(method.hinge(middle, f_s, f_u), torch.full((3,), 0.05), atol=1e-5, rtol=0)


class Looking(TRCE):
    """Keeps what each training step would see."""

    def loss(self, prompts):
        self.seen = [*getattr(self, "seen", []), self.look(prompts)]
        return super().loss(prompts)

    def look(self, prompts):
        z, t = self.teacher.noise([5]), torch.tensor([700])
        c = self.teacher.encode_prompts(["a cat"])
        with torch.no_grad():
            return [m.predict(z, t, c) for m in (self._original, self.teacher, self.student)]


def test_steering_goes_by_the_unedited_model_and_preserving_by_the_model_after_the_first_stage(model):
    z, t, c = model.noise([5]), torch.tensor([700]), model.encode_prompts(["a cat"])
    unedited = model.predict(z, t, c)
    method = trce(Looking, lr=1e-2)
    with method.closed_form(model, TASK).applied_to(model):
        first = model.predict(z, t, c)
    erasure = method.fit(model, TASK)
    for original, teacher, _ in method.seen:
        torch.testing.assert_close(original, unedited)
        torch.testing.assert_close(teacher, first)
    (_, _, start), (_, _, moved) = method.seen
    torch.testing.assert_close(start, first)
    assert not torch.allclose(moved, first) and not torch.allclose(first, unedited)
    assert torch.equal(model.predict(z, t, c), unedited)
    with erasure.applied_to(model):
        assert not torch.allclose(model.predict(z, t, c), moved), "and one step more"


def test_the_loss_is_the_mean_of_two_hinges_with_guided_predictions_of_the_unedited_model(model):
    method = trce(g=4.0, margin=50.0, preserve_scale=0.0)
    method.student = method.teacher = method._original = model
    method.task = TASK
    z, t, c = model.noise([5]), torch.tensor([700]), model.encode_prompts([TASK.prompt("ox")])
    method.points = lambda *_: (z, t, c)
    eps_0, eps_s, eps_u = (
        model.predict(z, t, model.encode_prompts([p])) for p in ("", TASK.prompt("dog"), TASK.prompt("ox"))
    )
    f_s, f_u = (eps + 4 * (eps - eps_0) for eps in (eps_s, eps_u))
    two = [F.mse_loss(eps, f_s) - F.mse_loss(eps, f_u) + 50 for eps in (eps_u, eps_0)]
    assert abs(two[0] - 50) > 1e-3
    torch.testing.assert_close(method.loss([TASK.prompt("ox")]), sum(two) / 2, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("trajectory", ["exact", "reuse"])
def test_only_the_first_steps_are_steered(model, trajectory):
    method = trce(early=0.5, trajectory=trajectory)
    times = [[int(points(model, ["cat"])[1]) for _ in range(8)] for points in (method.points, method.others)]
    assert min(times[0]) >= 500 and min(times[1]) < 500


def test_the_first_stage_moves_the_texts_maps_and_the_second_self_attention_and_queries(model):
    erasure, own = trce().fit(model, TASK), model.named_parameters()
    moved = {name for name, value in erasure.weights.items() if not torch.equal(value, own[name])}
    maps = {f"{name}.weight" for name in projections(model)}
    assert maps <= moved and moved - maps <= {n for n in own if "attn1" in n or "attn2.to_q" in n}
    assert any("attn1" in n for n in moved) and any("attn2.to_q" in n for n in moved)
    still = trce(optimizer=torch.optim.SGD, lr=0.0).fit(model, TASK)
    first = trce().closed_form(model, TASK).weights
    assert all(torch.equal(value, first.get(name, own[name])) for name, value in still.weights.items())


def test_a_second_fit_is_the_same(model):
    method, digests = trce(trajectory="reuse"), []
    for _ in range(2):
        pl.seed_everything(7, verbose=False)
        digests.append(method.fit(model, TASK).digest)
    assert digests[0] == digests[1]


def test_an_interrupted_fit_resumes_with_the_same_points(model, tmp_path):
    def keep(folder):
        keeper = pl.callbacks.ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=1)
        method = trce(iterations=4, trajectory="reuse")
        method._make_trainer = partial(method._make_trainer, enable_checkpointing=True, callbacks=[keeper])
        return method

    class Interrupting(TRCE):
        def loss(self, prompts):
            if self.global_step == 2 and not (tmp_path / "interrupted").exists():
                (tmp_path / "interrupted").touch()
                raise RuntimeError("interrupted")
            return super().loss(prompts)

    pl.seed_everything(7, verbose=False)
    whole = keep(tmp_path / "whole").fit(model, TASK)
    pl.seed_everything(7, verbose=False)
    method = keep(tmp_path / "parts")
    method.__class__ = Interrupting
    with pytest.raises(RuntimeError, match="interrupted"):
        method.fit(model, TASK)
    pl.seed_everything(7, verbose=False)
    method = keep(tmp_path / "parts")
    method.__class__ = Interrupting
    assert method.fit(model, TASK).digest == whole.digest


@pytest.mark.parametrize("family", ["sd3", "pixart"])
def test_other_families(family, tmp_path):
    model = tiny.FAMILIES[family].load(str(tiny.save(family, tmp_path)), device="cpu")
    assert not trce(iterations=1).fit(model, TASK).empty


def test_a_model_that_reads_no_text_is_refused(tmp_path):
    model = tiny.FAMILIES["dit"].load(str(tiny.save("dit", tmp_path)), device="cpu")
    with pytest.raises(UserError, match="text"):
        trce().fit(model, UnlearningTask(erase=(Concept("tiger cat"),)))

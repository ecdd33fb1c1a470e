"""AdvUnlearn's theorems (arXiv:2405.15234): ESD's objective for a text encoder, under adversarial tokens."""

from functools import partial
from unittest.mock import Mock

import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from omegaconf import OmegaConf

from tests import tiny
from unlearning.__main__ import CONF
from unlearning.concepts import Concept, UnlearningTask
from unlearning.errors import UserError
from unlearning.methods.advunlearn import AdversarialTokens, AdvUnlearn
from unlearning.sampling.inversion import Placeholder
from unlearning.training.student import Weights

TASK = UnlearningTask(erase=(Concept("cat"), Concept("ox")), retain=(Concept("dog"), Concept("tree")))
PATTERN = OmegaConf.load(CONF / "method" / "advunlearn.yaml").student.parameters


def loaded(family, folder):
    """A model that takes the prompt seriously: the tiny ones' output hardly depends on it."""
    model = tiny.FAMILIES[family].load(str(folder), device="cpu")
    with torch.no_grad():
        for name, m in model.text_projections():
            m.weight.mul_(20 if name.endswith("to_v") else 1)
    return model


@pytest.fixture(scope="module")
def model(sd1):
    return loaded("sd1", sd1)


def advunlearn(*, lr=1e-2, **settings) -> AdvUnlearn:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return AdvUnlearn(**{
        "student": Weights(PATTERN), "iterations": 2, "steps": 3, "inner_steps": 2, "warmup_steps": 0, "tokens": 2,
        "retained_batch": 2, "optimizer": partial(torch.optim.Adam, lr=lr),
        "trainer": partial(pl.Trainer, enable_model_summary=False, **quiet), **settings,
    })  # fmt: skip


def before_training(model, **settings) -> AdvUnlearn:
    method = advunlearn(**settings)
    method.student, method.teacher, method.task, method.seed = model, model.snapshot([]), TASK, 0
    torch.manual_seed(0)
    method._adversary = AdversarialTokens(model, ["cat", "ox"], method.tokens)
    return method


def at(method, model, prompts=("cat",)):
    """Fixed points in the place of those of trajectories."""
    point = model.noise([5] * len(prompts)), torch.full((len(prompts),), 400), model.encode_prompts(list(prompts))
    method.points = Mock(return_value=point)
    return point


# --- the objective ----------------------------------------------------------------------------------------------------


def test_before_the_first_search_it_is_esds_objective(model):
    """Before training, without retained concepts: || (1 + eta) (eps_c - eps_0) ||^2."""
    method = before_training(model, eta=2.0, gamma=0.0, warmup_steps=1)
    x_t, t, c = at(method, model)
    difference = model.predict(x_t, t, c) - model.predict(x_t, t, model.encode_prompts([""]))
    loss = method.loss(["cat"])
    assert loss > 1e-3
    torch.testing.assert_close(loss, (3 * difference).square().mean(), atol=1e-6, rtol=1e-3)


def test_after_a_search_the_same_target_is_for_the_prompt_behind_the_tokens_that_it_found(model):
    method = before_training(model, gamma=0.0)
    x_t, t, c = at(method, model, ["ox", "cat"])
    loss = method.loss(["ox", "cat"])
    delta = method._adversary.delta["text_encoder"]
    place = Placeholder.in_prompts(model, ["{} {} ox", "{} {} cat"])
    attacked = model.encode(place.filled({"text_encoder": delta[[1, 0]]}))
    eps_0, eps_c = model.predict(x_t, t, model.encode_prompts([""] * 2)), model.predict(x_t, t, c)
    expected = F.mse_loss(model.predict(x_t, t, attacked), eps_0 - (eps_c - eps_0))
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-3)


def test_the_retain_loss_is_zero_before_the_encoder_changes(model):
    method = before_training(model, gamma=1.0)
    method._retained = ["a dog"]
    torch.testing.assert_close(method.retaining(), torch.tensor(0.0), atol=1e-9, rtol=0)
    with Weights(PATTERN).of(model) as pair, torch.no_grad():
        method.teacher = pair.teacher
        for p in pair.parameters.values():
            p.add_(0.1 * torch.randn_like(p))
        assert method.retaining() > 1e-6


# --- the search -------------------------------------------------------------------------------------------------------


def test_the_search_brings_the_concept_back(model):
    """On a trained encoder, the search finds tokens with a prediction nearer to that of the concept."""
    torch.manual_seed(3)
    with Weights(PATTERN).of(model) as pair:
        method = before_training(model, inner_steps=20, inner_lr=0.1, attack_init="latest")
        method.teacher = pair.teacher
        with torch.no_grad():
            for p in pair.parameters.values():
                p.add_(0.1 * torch.randn_like(p))
        point = at(method, model)
        before = method.distance(*point).item()
        method.attack(["cat"])
        assert method.distance(*point).item() < 0.8 * before
        assert all(p.grad is None for p in pair.parameters.values()), "the encoder waits for its own step"


def test_fast_at_is_one_step_of_the_same_length_for_every_coordinate(model):
    method = before_training(model, inner_steps=1, inner_lr=0.01, sign=True, attack_init="latest")
    at(method, model, ["ox"])
    start = method._adversary.delta["text_encoder"].detach().clone()
    method.attack(["ox"])
    cat, ox = (method._adversary.delta["text_encoder"].detach() - start).abs()
    torch.testing.assert_close(ox, torch.full_like(ox, 0.01), atol=1e-5, rtol=0)
    assert not cat.any(), "the other prompt's tokens stay"


@pytest.mark.parametrize(("sign", "expected"), [(False, [1.0, -2.0, -2.0]), (True, [1.0, -1.0, -1.0])])
def test_an_accumulating_search_goes_by_the_sum_of_its_gradients(model, monkeypatch, sign, expected):
    """Of the gradients 1, -3 and 0; a step by the sign leaves the sign."""
    method, step, used = before_training(model, sign=sign, accumulate=True, inner_steps=3), torch.optim.Adam.step, []

    def watched(adam):
        used.append(adam.param_groups[0]["params"][0].grad.unique().item())
        step(adam)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    method.draw = lambda prompts: ()
    for _ in range(2):  # the second search begins without any
        slopes = iter([1.0, -3.0, 0.0])
        method.distance = lambda slopes=slopes: next(slopes) * sum(v.sum() for v in method._adversary.delta.values())
        method.attack(["cat"])
    assert used == 2 * expected


def test_a_search_takes_points_of_its_own_prompts(model):
    """Of two concepts, with trajectory=reuse, which keeps points."""
    method = before_training(model, trajectory="reuse", inner_steps=2)
    drawn, points = [], method.points
    method.draw = lambda prompts: drawn.append(points(model, prompts)) or drawn[-1]
    for prompt in ("cat", "ox"):
        method.attack([prompt])
        assert {c.prompts for _, _, c in drawn[-2:]} == {(prompt,)}


@pytest.mark.parametrize("attack_init", ["latest", "random"])
def test_a_search_starts_from_the_last_one_or_from_scratch(model, attack_init):
    method = before_training(model, attack_init=attack_init, inner_lr=1e-9)
    at(method, model)
    start = method._adversary.delta["text_encoder"].detach().clone()
    method.attack(["cat"])
    near = torch.allclose(method._adversary.delta["text_encoder"], start, atol=1e-6)
    assert near == (attack_init == "latest")


def test_tokens_are_restored_from_a_checkpoint(model):
    torch.manual_seed(1)
    first = AdversarialTokens(model, ["cat"], 2)
    second = AdversarialTokens(model, ["cat"], 2)
    assert not torch.equal(first.delta["text_encoder"], second.delta["text_encoder"])
    second.restore(first.state())
    assert torch.equal(first.before(["cat"]).embeds["text_encoder"], second.before(["cat"]).embeds["text_encoder"])


# --- the training -----------------------------------------------------------------------------------------------------


def test_only_the_layers_of_the_text_encoder_and_its_last_norm_move(model):
    patch = advunlearn().fit(model, TASK)
    own = model.named_parameters()
    assert patch.weights.keys() == {n for n in own if n.startswith("text_encoder.") and "embedding" not in n}
    assert all((patch.weights[n] != own[n]).any() for n in patch.weights if n.endswith("fc1.weight"))


def test_training_brings_the_concepts_prediction_to_the_target(model):
    torch.manual_seed(0)
    x, t = torch.randn(16, *model.latent_shape), torch.randint(1000, (16,))

    def eps(prompt):
        return model.predict(x, t, model.encode_prompts([prompt] * 16))

    target = 2 * eps("") - eps("cat")
    before = F.mse_loss(eps("cat"), target)
    settings = {"iterations": 25, "warmup_steps": 20, "inner_steps": 1, "trajectory": "reuse", "batch_size": 4}
    erasure = advunlearn(lr=2e-2, gamma=0.0, **settings).fit(model, UnlearningTask(TASK.erase[:1]))
    with erasure.applied_to(model):
        assert F.mse_loss(eps("cat"), target) < 0.7 * before


def test_a_second_fit_is_the_same(model):
    digests = []
    for _ in range(2):
        pl.seed_everything(7, verbose=False)
        digests.append(advunlearn(trajectory="reuse").fit(model, TASK).digest)
    assert digests[0] == digests[1]


def test_an_interrupted_fit_resumes_with_the_same_tokens(model, tmp_path):
    def keep(folder):
        keeper = pl.callbacks.ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=1)
        method = advunlearn(iterations=4, attack_init="latest", trajectory="reuse")
        method._make_trainer = partial(method._make_trainer, enable_checkpointing=True, callbacks=[keeper])
        return method

    class Interrupting(AdvUnlearn):
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


@pytest.mark.parametrize("family", ["sdxl", "sd3"])
def test_all_clip_encoders_are_attacked_and_trained(family, tmp_path):
    model = loaded(family, tiny.save(family, tmp_path))
    patch = advunlearn(iterations=1).fit(model, TASK)
    assert {name.partition(".")[0] for name in patch.weights} == {"text_encoder", "text_encoder_2"}
    assert AdversarialTokens(model, ["cat"], 1).delta.keys() == {"text_encoder", "text_encoder_2"}


@pytest.mark.parametrize("family", ["flux", "dit"])
def test_a_model_whose_text_is_not_read_by_clip_is_refused(family, tmp_path):
    model = loaded(family, tiny.save(family, tmp_path))
    with pytest.raises(UserError):
        advunlearn().fit(model, TASK)


def test_retaining_needs_something_to_retain(model):
    bare = UnlearningTask(erase=(Concept("cat"),))
    with pytest.raises(UserError, match="retained="):
        advunlearn().fit(model, bare)
    assert not advunlearn(gamma=0.0, iterations=1).fit(model, bare).empty
    assert not advunlearn(retained=("dog",), iterations=1).fit(model, bare).empty

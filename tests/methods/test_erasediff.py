"""EraseDiff's theorems (Wu et al., 2025): the gradient of the bilevel step, and the effect of the inner problem."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch

from unlearning.concepts import Concept, UnlearningTask
from unlearning.data.generated import Generated
from unlearning.errors import UserError
from unlearning.methods.erasediff import EraseDiff
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.sampler import Sampler
from unlearning.training.student import Weights

TASK = UnlearningTask(erase=(Concept("cat", anchor="forest"),), retain=(Concept("dog"), Concept("ship")))


@pytest.fixture(scope="module")
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


@pytest.fixture
def make(tmp_path):
    def of(*, iterations=3, optimizer=None, parameters="attn2", **settings) -> EraseDiff:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
        return EraseDiff(
            generated=Generated(str(tmp_path), Sampler(steps=2)),
            count=4,
            student=Weights(parameters),
            iterations=iterations,
            batch_size=2,
            optimizer=optimizer or partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
            trainer=partial(pl.Trainer, enable_model_summary=False, **quiet),
            **settings,
        )

    return of


def fitted(make, model, **settings):
    pl.seed_everything(3, verbose=False)
    return make(**settings).fit(model, TASK)


class Linear(EraseDiff):
    """Losses with known gradients: L_r = <r, theta>, L_f = <f, theta>."""

    def forgetting(self, x_0, prompts):
        return sum((p * self.f[n]).sum() for n, p in self.pair.parameters.items())

    def retaining(self, x_0, prompts):
        return sum((p * self.r[n]).sum() for n, p in self.pair.parameters.items())


def known(model, method):
    weights = {n: p for n, p in model.named_parameters().items() if "attn2" in n}
    method.__class__ = Linear
    method.f, method.r = ({n: torch.randn_like(p) for n, p in weights.items()} for _ in range(2))
    return method


def test_a_step_is_down_the_gradient_of_retaining_and_lamb_times_forgetting(model, make):
    sgd = partial(torch.optim.SGD, lr=0.1)
    method = known(model, make(iterations=1, optimizer=sgd, lamb=0.3, inner_steps=2))
    own = model.named_parameters()
    for name, value in method.fit(model, TASK).weights.items():
        step = -0.1 * (method.r[name] + 0.3 * method.f[name])
        torch.testing.assert_close(value, own[name] + step, atol=1e-6, rtol=1e-5)


def test_the_adaptive_lamb_is_eta_minus_the_cosine(model, make):
    sgd = partial(torch.optim.SGD, lr=0.1)
    own = model.named_parameters()
    for eta in (0.5, -2.0):
        method = known(model, make(iterations=1, optimizer=sgd, lamb=None, eta=eta, inner_steps=0))
        r, f = (torch.cat([g.flatten() for g in part.values()]) for part in (method.r, method.f))
        lamb = max(0, eta - float(torch.cosine_similarity(r, f, dim=0)))
        for name, value in method.fit(model, TASK).weights.items():
            step = -0.1 * (method.r[name] + lamb * method.f[name])
            torch.testing.assert_close(value, own[name] + step, atol=1e-6, rtol=1e-5)
    assert lamb == 0


def test_the_inner_problem_is_first_order_it_acts_through_the_optimizers_state_alone(model, make):
    """Without a state, the number of inner steps changes no weight; with Adam's moments, it does."""

    class Seeded(EraseDiff):
        def _inner(self, *batch):
            state = torch.get_rng_state()
            try:
                return super()._inner(*batch)
            finally:
                torch.set_rng_state(state)  # the outer step's noise is then the same

    def digest(optimizer, inner_steps):
        pl.seed_everything(3, verbose=False)
        method = make(inner_steps=inner_steps, optimizer=optimizer)
        method.__class__ = Seeded
        return method.fit(model, TASK).digest

    sgd, adam = partial(torch.optim.SGD, lr=0.1), partial(torch.optim.Adam, lr=1e-2)
    assert digest(sgd, 0) == digest(sgd, 3)
    assert digest(adam, 0) != digest(adam, 3)


def test_the_inner_steps_descend_and_are_undone(model, make):
    seen = []

    class Watched(EraseDiff):
        def _inner(self, x_0, prompts):
            before = {n: p.detach().clone() for n, p in self.pair.parameters.items()}
            lowest = super()._inner(x_0, prompts)
            undone = all(torch.equal(p, before[n]) for n, p in self.pair.parameters.items())
            with torch.no_grad():
                seen.append((undone, lowest, float(self.forgetting(x_0, prompts))))
            return lowest

    method = make(inner_steps=5, iterations=2, optimizer=partial(torch.optim.Adam, lr=1e-2))
    method.__class__ = Watched
    method.fit(model, TASK)
    assert len(seen) == 2 and all(undone and lowest < now for undone, lowest, now in seen)


def test_training_brings_the_concepts_prediction_to_the_anchors(model, make):
    adam = partial(torch.optim.Adam, lr=1e-2)
    settings = {"iterations": 15, "optimizer": adam, "parameters": r"^unet\.", "lamb": 10.0, "inner_steps": 0}
    patch = fitted(make, model, **settings)
    c, anchor = (model.encode_prompts([TASK.prompt(name)] * 16) for name in ("cat", "forest"))
    x, t = torch.randn(16, *model.latent_shape), torch.randint(1000, (16,))
    before = (model.predict(x, t, c) - model.predict(x, t, anchor)).pow(2).mean()
    with patch.applied_to(model):
        after = (model.predict(x, t, c) - model.predict(x, t, anchor)).pow(2).mean()
    assert after < 0.5 * before


def test_a_concept_with_nothing_to_relabel_it_as_is_refused(model, make):
    with pytest.raises(UserError, match=r"dataset\.anchor"):
        make().fit(model, UnlearningTask(erase=(Concept("cat"),)))

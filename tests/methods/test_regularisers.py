"""Regularisers around trained methods: their guarantees, on ESD-x, Concept Ablation and the scrubber."""

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from tests import tiny
from unlearning.api import erase
from unlearning.concepts import Concept, UnlearningTask
from unlearning.data.generated import Generated
from unlearning.errors import UserError
from unlearning.methods.closed_form import states
from unlearning.methods.concept_ablation import ConceptAblation
from unlearning.methods.esd import ESD
from unlearning.methods.regularisers import L1SP, L2SP, GradientProjection, Merge, SelFT, ties
from unlearning.methods.scrubber import Scrubber
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.sampler import Sampler
from unlearning.scrubbing.prototypes import PrototypeSearch
from unlearning.training.regulariser import largest
from unlearning.training.student import LoRA, Weights

RETAIN = ("dog", "ship", "car")
RNG = np.random.default_rng(0)
IMAGES = [RNG.integers(0, 256, (16, 16, 3), np.uint8) for _ in range(6)]
TASK = UnlearningTask((Concept("cat", anchor="forest"),), retain=tuple(map(Concept, RETAIN)), forget_images=IMAGES)
METHODS = ("esd", "ablation", "scrubber")


@pytest.fixture(scope="module")
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


@pytest.fixture
def make(tmp_path):
    """make(name, **settings): a method, with a momentum and a weight decay that move also what has no gradient."""

    def of(name, *, iterations=3, student=None, optimizer=None, **settings):
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
        training = {
            "student": student or Weights("attn2"),
            "iterations": iterations,
            "batch_size": 2,
            "optimizer": optimizer or partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
            "trainer": partial(pl.Trainer, enable_model_summary=False, **quiet),
            **settings,
        }
        if name == "esd":
            return ESD(steps=3, **training)
        if name == "ablation":
            drawn = Generated(str(tmp_path), Sampler(steps=2))
            return ConceptAblation(generated=drawn, count=4, templates=["a {}"], **training)
        search = PrototypeSearch(K=4, tau=0.0, vectors=100, purity=0.0, confirmed=False, centred=False)
        return Scrubber(prototypes=search, conditioning="null", blinding="gaussian", **training)

    return of


def moved(model, patch):
    """What each weight has moved by."""
    own = model.named_parameters()
    return {name: value - own[name].detach() for name, value in patch.weights.items()}


def shift(model, patch):
    """The mean absolute distance."""
    steps = moved(model, patch).values()
    return sum(step.abs().sum() for step in steps) / sum(step.numel() for step in steps)


@pytest.mark.parametrize("name", ["esd", "scrubber"])
def test_a_penalty_keeps_weights_near_their_start(model, make, name):
    shifts = []
    for regulariser in (None, L1SP(0.1), L2SP(1e6)):
        pl.seed_everything(3, verbose=False)
        method = make(name, iterations=5, optimizer=partial(torch.optim.SGD, lr=1e-3), regulariser=regulariser)
        shifts.append(shift(model, method.fit(model, TASK)))
    free, *bound = shifts
    assert all(0 < short < free for short in bound)


def test_the_penalties_are_means_over_all_entries():
    start = {"a": torch.zeros(3), "b": torch.ones(1)}
    theta = {"a": torch.tensor([1.0, -2.0, 0.0]), "b": torch.tensor([4.0])}
    assert L1SP(2.0).penalty(theta, start).item() == pytest.approx(2 * (1 + 2 + 3) / 4)
    assert L2SP(2.0).penalty(theta, start).item() == pytest.approx(2 * (1 + 4 + 9) / 4)


@pytest.mark.parametrize("share", [0.001, 0.25, 0.9, 1.0])
def test_the_largest_entries_are_as_many_as_asked_for_whatever_ties_there_are(share):
    scores = {"a": torch.randn(30, 40), "b": torch.zeros(700), "c": torch.randn(100).bfloat16()}
    masks = largest(scores, share)
    chosen = torch.cat([scores[n][masks[n]].float() for n in scores])
    flat = torch.cat([score.flatten().float() for score in scores.values()])
    torch.testing.assert_close(chosen.sort().values, flat.sort().values[-max(1, int(share * 2000)) :])


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_non_finite_importance_is_an_error(broken):
    with pytest.raises(UserError, match="not finite"):
        largest({"a": torch.ones(3), "b": torch.tensor([1.0, broken])}, 0.5)


@pytest.mark.parametrize("name", ["esd", "scrubber"])
def test_projected_updates_change_no_output_for_retained_concepts(model, make, name):
    """Under Adam, with weight decay: theta C = theta_0 C, while other states are mapped elsewhere."""
    patch = make(name, regulariser=GradientProjection()).fit(model, TASK)
    C = torch.cat(states(model, [TASK.prompt(word) for word in RETAIN], "last")).T
    cat = states(model, [TASK.prompt("cat")], "last")[0].T
    steps = moved(model, patch)
    reading = [f"{n}.weight" for n, _ in model.text_projections()]
    assert set(reading) <= steps.keys()
    for step in map(steps.get, reading):
        torch.testing.assert_close(step @ C, torch.zeros(len(step), C.shape[1]), atol=2e-5, rtol=0)
        assert (step @ cat).abs().max() > 1e-3


def test_projected_gradients_hold_under_sgd_and_not_under_adam(model, make):
    C = torch.cat(states(model, [TASK.prompt(word) for word in RETAIN], "last")).T
    reading = [f"{n}.weight" for n, _ in model.text_projections()]
    leaks = {}
    for name, optimizer, lr in (("sgd", torch.optim.SGD, 10.0), ("adam", torch.optim.Adam, 1e-2)):
        fit = make("esd", optimizer=partial(optimizer, lr=lr), regulariser=GradientProjection("gradient"))
        steps = moved(model, fit.fit(model, TASK))
        leaks[name] = max((steps[n] @ C).norm() / steps[n].norm() for n in reading)
    assert leaks["sgd"] < 1e-3 < 0.1 < leaks["adam"]
    weight = model.named_parameters()[reading[0]]
    weight.requires_grad_()
    model.predict(model.noise([0]), torch.tensor([5]), model.encode_prompts(["dog"])).sum().backward()
    assert (weight.grad @ C).abs().max() > 1e-6, "the hooks are gone once the fit is over"
    weight.requires_grad_(False)
    weight.grad = None


@pytest.mark.parametrize("name", METHODS)
def test_selft_moves_its_share_and_every_other_entry_stays_bit_identical(model, make, name):
    patch = make(name, regulariser=SelFT(share=0.1, batches=3)).fit(model, TASK)
    steps = moved(model, patch)
    share = sum(int((s != 0).sum()) for s in steps.values()) / sum(s.numel() for s in steps.values())
    assert 0.08 < share <= 0.1


def test_selft_moves_the_entries_of_the_largest_product_of_weight_and_gradient(model, make):
    class Linear(ESD):
        """Its gradient is g, whatever the batch."""

        def loss(self, prompts):
            return sum((p * g[n]).sum() for n, p in self.pair.parameters.items())

    g = {n: torch.randn_like(p) for n, p in model.named_parameters().items() if "attn2" in n}
    method = make("esd", regulariser=SelFT(share=0.25, batches=2))
    method.__class__ = Linear
    steps = moved(model, method.fit(model, TASK))
    scores = {n: (p.detach() * g[n]).abs() for n, p in model.named_parameters().items() if n in g}
    masks = largest(scores, 0.25)
    assert all(torch.equal(steps[n] != 0, masks[n]) for n in g)


@pytest.mark.parametrize(("name", "ways"), [("esd", ("sum", "mean", "ties")), ("scrubber", ("ties",))])
def test_merging_combines_the_updates_of_single_concepts(model, make, name, ways):
    both = replace(TASK, erase=(Concept("cat", anchor="forest"), Concept("ox", anchor="sea")))

    def steps(task, regulariser=None):
        pl.seed_everything(3, verbose=False)
        return moved(model, make(name, iterations=2, regulariser=regulariser).fit(model, task))

    alone = [steps(replace(TASK, erase=(concept,))) for concept in both.erase]
    tau = {n: torch.stack([own[n] for own in alone]) for n in alone[0]}
    combined = {"sum": lambda t: t.sum(0), "mean": lambda t: t.mean(0), "ties": lambda t: ties(t, 0.3)}
    for how in ways:
        for n, value in steps(both, Merge(how, scale=0.5, share=0.3)).items():
            torch.testing.assert_close(value, 0.5 * combined[how](tau[n]), atol=1e-6, rtol=1e-4)


def test_ties_trims_elects_and_averages_those_that_agree():
    tau = torch.tensor([[3.0, -1.0, 2.0, 0.1], [1.0, 4.0, -3.0, 0.2]])
    torch.testing.assert_close(ties(tau, 1.0), torch.tensor([2.0, 4.0, -3.0, 0.15]))
    torch.testing.assert_close(ties(tau, 0.5), torch.tensor([3.0, 4.0, -3.0, 0.0]), msg="two entries of each are kept")


def test_one_concept_is_not_merged(model, make):
    patches = []
    for regulariser in (None, Merge()):
        pl.seed_everything(3, verbose=False)
        patches.append(make("esd", regulariser=regulariser).fit(model, TASK))
    assert patches[0].digest == patches[1].digest


@pytest.mark.parametrize("regulariser", [GradientProjection(), SelFT(batches=1), Merge()])
def test_a_regulariser_refuses_unsupported_students(model, make, regulariser):
    several = UnlearningTask(erase=(Concept("cat"), Concept("ox")), retain=TASK.retain)
    with pytest.raises(UserError, match="student"):
        make("esd", student=LoRA("attn2"), regulariser=regulariser).fit(model, several)


def test_projection_needs_concepts_to_retain_and_room_beside_them(sd1, make):
    model = StableDiffusion.load(str(sd1), device="cpu")
    model.layer("text_encoder.final_layer_norm").bias.data.normal_()  # states have a mean of 0 without it
    with pytest.raises(UserError, match=r"dataset\.retain"):
        make("esd", regulariser=GradientProjection()).fit(model, UnlearningTask(erase=TASK.erase))
    with pytest.raises(UserError, match="positions=last"):
        make("esd", regulariser=GradientProjection(positions="all")).fit(model, TASK)


def test_the_command_line_puts_a_regulariser_around_the_method(unlearn, error_of, tmp_path):
    common = ["method.iterations=1", "method.steps=2", "stages=[fit]", "concept=cat"]
    folder = unlearn("method=esd_x", "regulariser=selft", "method.regulariser.batches=1", *common)
    assert "SelFT" in (folder / ".hydra" / "resolved.yaml").read_text()
    assert "regulariser" in error_of("method=uce", "regulariser=selft", "stages=[fit]", run="refused")


def test_a_call_from_python_takes_a_regulariser():
    settings = {"iterations": 2, "steps": 2, "optimizer": {"lr": 1e-2}, "return_erasure": True}
    free, bound = (erase(tiny.pipeline("sd1"), "cat", method="esd_x", **settings, **more)
                   for more in ({}, {"regulariser": SelFT(share=0.1, batches=1)}))  # fmt: skip
    assert free.digest != bound.digest

"""Scrub, then solve: keeps the scrubber's change for the found words only."""

from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf

from unlearning.__main__ import CONF
from unlearning.erasures.weight_patch import WeightPatch
from unlearning.errors import UserError
from unlearning.methods.closed_form import projections, states
from unlearning.methods.scrub_solve import ScrubSolve
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.scrubbing.words import TEMPLATES
from unlearning.training.student import LoRA, Weights

WORDS, OTHERS = ("cat", "tiger"), ("dog", "clock", "pizza", "sky")


MAPS = Weights(OmegaConf.load(CONF / "method" / "scrub_solve.yaml").scrubber.student.parameters)


class Trained:
    """A scrubber that moves every map that reads text at random."""

    def __init__(self, student=MAPS, conditioning="words"):
        self.figures, self.rows = {}, SimpleNamespace(words=WORDS, others=OTHERS)
        self.moving, self.conditioning = student, conditioning

    def fit(self, model, task) -> WeightPatch:
        torch.manual_seed(0)
        weights = {f"{name}.weight": m.weight.detach() for name, m in projections(model).items()}
        self.moved = {name: W + 0.1 * torch.randn_like(W) for name, W in weights.items()}
        return WeightPatch(self.moved)


@pytest.fixture(scope="module")
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


def test_it_is_the_minimiser(model):
    """The gradient of the sum of squares is zero, for every map."""
    scrubber, s, lamb = Trained(), 0.3, 0.2
    solved = ScrubSolve(scrubber=scrubber, preserve_scale=s, lamb=lamb).fit(model, None)
    erased = [template.format(word) for word in WORDS for template in TEMPLATES]
    held = ["", *(template.format(word) for word, template in zip(OTHERS, TEMPLATES, strict=False))]
    c, r = (torch.cat(states(model, *some)).double() for some in ((erased, "to_end"), (held, "all")))
    for name, linear in projections(model).items():
        W, W_S = linear.weight.detach().double(), scrubber.moved[f"{name}.weight"].double()
        W_new = solved.weights[f"{name}.weight"].double().requires_grad_()
        loss = (c @ (W_new - W_S).T).square().sum() + s * (r @ (W_new - W).T).square().sum()
        [gradient] = torch.autograd.grad(loss + lamb * (W_new - W).square().sum(), W_new)
        scale = torch.autograd.grad((c @ (W_new - W).T).square().sum(), W_new)[0].abs().max()
        assert gradient.abs().max() < 1e-4 * scale


def test_a_zero_preserve_scale_keeps_the_trained_map_and_a_large_one_restores_the_original(model):
    scrubber, start = Trained(), model.named_parameters()

    def distance(**settings) -> tuple[float, float]:
        """Of what the words read to what the scrubber made of it, and to what it was, as shares of the change."""
        solved = ScrubSolve(scrubber=scrubber, **settings).fit(model, None)
        c = torch.cat(states(model, ["a cat", "the tiger"], "to_end")).double()
        name, W = next(iter(solved.weights.items()))
        W, W_S, W_0 = (v.detach().double() for v in (W, scrubber.moved[name], start[name]))
        whole = (c @ (W_S - W_0).T).norm()
        return float((c @ (W - W_S).T).norm() / whole), float((c @ (W - W_0).T).norm() / whole)

    assert distance(preserve_scale=0.0, lamb=1e-9)[0] < 1e-3
    assert distance(preserve_scale=1e9)[1] < 1e-3


@pytest.mark.parametrize(
    ("scrubber", "setting"),
    [(Trained(conditioning="null"), "conditioning"), (Trained(LoRA("attn2")), "student"),
     (Trained(Weights("conv_in")), r"student\.parameters")],
)  # fmt: skip
def test_an_unsupported_scrubber_is_refused_before_training(model, scrubber, setting):
    scrubber.fit = None
    with pytest.raises(UserError, match=f"scrubber.{setting}"):
        ScrubSolve(scrubber=scrubber).fit(model, None)


@pytest.mark.parametrize("any_pipeline", ["sd1", "sd3", "dit"], indirect=True)
def test_models_that_read_text_are_solved_for_and_others_refused(any_model):
    if not any_model.text_encoders:
        with pytest.raises(UserError, match="reads no text"):
            ScrubSolve(scrubber=Trained()).fit(any_model, None)
        return
    scrubber = Trained()
    solved = ScrubSolve(scrubber=scrubber).fit(any_model, None)
    assert solved.weights.keys() == scrubber.moved.keys()
    assert all(w.isfinite().all() and not torch.equal(w, scrubber.moved[n]) for n, w in solved.weights.items())

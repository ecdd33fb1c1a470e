"""UCE's theorems (Gandikota et al., 2024, eq. 7)."""

import pytest
import torch

from unlearning.data.objects import emoji_objects
from unlearning.methods.uce import UCE, closed_form
from unlearning.models.stable_diffusion import StableDiffusion


@pytest.fixture
def problem():
    torch.manual_seed(0)
    return torch.randn(6, 8), torch.randn(3, 8), torch.randn(3, 8), torch.tensor([1.0, 2.0, 0.5])  # W, c, c*, scale


def objective(W_new, W, c, c_star, scale, lamb):
    mapped = (scale * (c @ W_new.T - c_star @ W.T).pow(2).sum(1)).sum()
    return mapped + lamb * (W_new - W).pow(2).sum()


def test_it_is_the_minimiser(problem):
    W, c, c_star, scale = (v.double() for v in problem)
    best = closed_form(W, c, c_star, scale, 0.5).requires_grad_()
    objective(best, W, c, c_star, scale, 0.5).backward()
    torch.testing.assert_close(best.grad, torch.zeros_like(best), atol=1e-9, rtol=0)


def test_a_large_lambda_changes_nothing(problem):
    W, c, c_star, scale = problem
    torch.testing.assert_close(closed_form(W, c, c_star, scale, 1e9), W.double(), atol=1e-6, rtol=0)


def test_a_small_lambda_makes_the_concept_act_like_its_anchor(problem):
    W, c, c_star, scale = (v.double() for v in problem)
    edited = closed_form(W, c, c_star, scale, 1e-9)
    torch.testing.assert_close(c @ edited.T, c_star @ W.T, atol=1e-5, rtol=0)


def test_a_retained_concept_stays_where_it_was(problem):
    W, c, c_star, _ = (v.double() for v in problem)
    inputs, targets = torch.cat([c[:1], c[1:]]), torch.cat([c_star[:1], c[1:]])  # erase the first, retain the others
    edited = closed_form(W, inputs, targets, torch.ones(3), 1e-9)
    torch.testing.assert_close(c[1:] @ edited.T, c[1:] @ W.T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("templates", [("{}",), ("{}", "a photo of the {}")])
def test_after_the_edit_the_model_hears_the_anchor_in_the_concepts_name(sd1, templates):
    model, task = StableDiffusion.load(str(sd1), device="cpu"), emoji_objects("cat")
    patch = UCE(lamb=1e-6, preserve_scale=1e-9, templates=templates).fit(model, task)

    def heard(word):  # what each projection makes of the word's last piece
        c = model.encode_prompts([word]).embeds[0, model.last_token([word])[0]]
        return torch.cat([projection(c) for _, projection in model.text_projections()])

    anchor = heard("forest")
    with patch.applied_to(model):
        torch.testing.assert_close(heard("cat"), anchor, atol=1e-2, rtol=0)
    assert not torch.allclose(heard("cat"), anchor, atol=1e-2)

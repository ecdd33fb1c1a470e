"""RECE's theorems (Gong et al., 2024)."""

import pytest
import torch

from unlearning.concepts import Concept, UnlearningTask
from unlearning.errors import UserError
from unlearning.methods.rece import RECE, gram, returning
from unlearning.methods.uce import UCE
from unlearning.models.stable_diffusion import StableDiffusion

CAT = UnlearningTask(erase=(Concept("cat", anchor="forest"), Concept("ship")), retain=(Concept("dog"),))


@pytest.fixture(scope="module")
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


def maps(model) -> torch.Tensor:
    """Every map of the model, one below the other, (sum of O, D)."""
    return torch.cat([m.weight.detach().double() for _, m in model.text_projections()])


def brought_back(model, edited: torch.Tensor, lamb: float) -> torch.Tensor:
    """How near the states of "cat" come back: the least || W' c' - W c ||^2 / || W c ||^2 of a small c'."""
    W, c = maps(model), model.encode_prompts(["cat"]).embeds[0].double()
    E = torch.linalg.lstsq(W, edited).solution
    away = returning(c, E, W.T @ W, lamb) @ edited.T - c @ W.T
    return away.square().sum() / (c @ W.T).square().sum()


def test_the_adversarial_embedding_is_a_stationary_point(model):
    torch.manual_seed(0)
    W, c, E = maps(model), torch.randn(5, 16).double(), torch.randn(16, 16).double()
    found = returning(c, E, gram(model), 0.1).requires_grad_()
    loss = ((found @ (W @ E).T - c @ W.T).square().sum() + 0.1 * found.square().sum()) / W.square().sum()
    loss.backward()
    torch.testing.assert_close(found.grad, torch.zeros_like(found), atol=1e-10, rtol=0)
    for size in (1e-2, 1.0):
        other = found.detach() + size * torch.randn_like(found)
        assert (other @ (W @ E).T - c @ W.T).square().sum() + 0.1 * other.square().sum() > loss * W.square().sum()


@pytest.mark.parametrize("settings", [{}, {"positions": "last", "lamb": 0.1, "preserve_null": False}])
def test_the_first_step_is_uces(model, settings):
    uce, rece = UCE(**settings).fit(model, CAT), RECE(repetitions=0, **settings).fit(model, CAT)
    assert uce.digest == rece.digest != RECE(repetitions=1, **settings).fit(model, CAT).digest


def test_a_repetition_is_the_closed_form_of_each_edited_map(model):
    """By the definition, map by map, with the weights of the model while the earlier edit is applied."""
    own, cat, ship, dog, null, forest = maps(model), *model.encode_prompts(["cat", "ship", "dog", "", "forest"]).embeds
    c, c_star = torch.cat([cat, ship]).double(), torch.cat([forest, null]).double()
    c_j = torch.cat([null, dog]).double()
    with UCE().fit(model, CAT).applied_to(model):
        W = maps(model)
    left = 0.1 * torch.eye(16).double() + W.T @ W
    back = torch.linalg.solve(left, W.T @ own @ c.T).T
    values, old = torch.cat([c_star, c_j]) @ W.T, torch.cat([back, c_j])
    s = torch.tensor([1.0] * len(c) + [0.1] * len(c_j)).double()[:, None]
    expected = (0.1 * W + values.T @ (s * old)) @ torch.linalg.inv(0.1 * torch.eye(16) + old.T @ (s * old))
    with RECE(repetitions=1).fit(model, CAT).applied_to(model):
        torch.testing.assert_close(maps(model), expected, atol=2e-4 * expected.abs().max().item(), rtol=0)


def test_after_each_repetition_less_of_the_concept_can_be_brought_back(model):
    left = []
    for repetitions in (0, 1, 3):
        with RECE(repetitions=repetitions, lamb=1e-3, again_lamb=1e-3).fit(model, CAT).applied_to(model):
            edited = maps(model)
        left.append(brought_back(model, edited, 1e-2))
    assert left[0] < left[1] < left[2]


@pytest.mark.parametrize("any_pipeline", ["sd1", "sd3", "dit"], indirect=True)
def test_models_that_read_text_are_edited_and_others_refused(any_model):
    if not list(any_model.text_projections()):
        with pytest.raises(UserError, match="reads no text"):
            RECE().fit(any_model, CAT)
        return
    before = {name: p.detach().clone() for name, p in any_model.named_parameters().items()}
    weights = RECE().fit(any_model, CAT).weights
    assert weights and all(torch.isfinite(w).all() for w in weights.values())
    assert all(not torch.equal(w, before[name]) for name, w in weights.items())

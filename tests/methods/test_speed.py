"""SPEED's theorems (Li et al., 2026): its invariants are exact."""

import pytest
import torch

from unlearning.concepts import Concept, UnlearningTask
from unlearning.errors import UserError
from unlearning.methods.speed import SPEED, centres, least_direction, most_moved, null_space, update
from unlearning.models.stable_diffusion import StableDiffusion

TASK = UnlearningTask(erase=(Concept("cat", anchor="forest"), Concept("ship")), retain=(Concept("dog"), Concept("sea")))
PLAIN = {"threshold": 1e-6, "augmented": 0}  # all directions but those of the retained states themselves


@pytest.fixture(scope="module")
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


@pytest.fixture
def problem():
    """A - C, C, retained states r and invariants K, in 16 dimensions."""
    torch.manual_seed(0)
    c, c_star, r, K = (torch.randn(n, 16).double() for n in (3, 3, 5, 4))
    return (c_star - c).T @ c / 3, c.T @ c / 3, r, K.T


def mapped(model, states: torch.Tensor) -> torch.Tensor:
    return torch.cat([m(states) for name, m in model.text_projections() if name.endswith("to_v")], -1)


# --- the algebra ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", [0.05, 1.0])
def test_retained_states_do_not_change(problem, s):
    difference, C, r, K = problem
    Y = update(difference, C, null_space(r, 1e-6), K, s, lamb=0.0)
    torch.testing.assert_close(Y @ r.T, torch.zeros(16, 5).double(), atol=1e-9, rtol=0)
    assert Y.norm() > 1e-2


def test_the_invariants_do_not_move_and_with_lamb_they_do(problem):
    difference, C, r, K = problem
    P = null_space(r, 1e-6)
    torch.testing.assert_close(
        update(difference, C, P, K, 1.0, 0.0) @ K, torch.zeros(16, 4).double(), atol=1e-9, rtol=0
    )
    assert (update(difference, C, P, K, 1.0, 0.5) @ K).norm() > 1e-2


def test_concepts_equal_to_their_anchors_change_nothing(problem):
    _, C, r, K = problem
    assert not update(torch.zeros_like(C), C, null_space(r, 1e-6), K, 1.0, 0.0).any()


def test_without_invariants_it_is_the_minimiser_in_the_null_space(problem):
    """The gradient of sum || c + Y P c - c* ||^2 + s || Y P ||^2 is zero, whatever the map."""
    torch.manual_seed(1)
    c, c_star, r = (torch.randn(n, 16).double() for n in (3, 3, 5))
    P = null_space(r, 1e-6)
    Y = update((c_star - c).T @ c, c.T @ c, P, torch.zeros(16, 1).double(), 0.7, lamb=1.0).requires_grad_()
    loss = (c @ (Y @ P).T - (c_star - c)).square().sum() + 0.7 * (Y @ P).square().sum()
    loss.backward()
    torch.testing.assert_close(Y.grad, torch.zeros_like(Y), atol=1e-9, rtol=0)


def test_invariants_within_the_span_of_what_is_retained_are_refused(problem):
    difference, C, r, _ = problem
    with pytest.raises(UserError, match="lamb"):
        update(difference, C, null_space(r, 1e-6), r[:2].T, 1.0, lamb=0.0)
    assert update(difference, C, null_space(r, 1e-6), r[:2].T, 1.0, lamb=0.5).isfinite().all()


def test_the_null_space_is_a_projector_and_a_full_one_is_refused():
    torch.manual_seed(0)
    r = torch.randn(5, 8).double()
    P, values = null_space(r, 1e-6), torch.linalg.eigvalsh(r.T @ r / 5)
    torch.testing.assert_close(P @ P, P)
    assert round(P.trace().item()) == 3
    threshold = values[-3:-1].mean().item()  # of eight eigenvalues, two are above
    few, many = null_space(r, threshold), null_space(r.repeat(3, 1), threshold)
    assert round(few.trace().item()) == 6
    torch.testing.assert_close(few, many)
    with pytest.raises(UserError, match="threshold"):
        null_space(torch.randn(50, 8).double(), 1e-6)


# --- the refinement ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_augmentation_goes_along_the_right_singular_vector_of_the_least_singular_value(shape):
    torch.manual_seed(0)
    W = torch.randn(shape).double()
    p, V = least_direction(W), torch.linalg.svd(W, full_matrices=False)[2]
    torch.testing.assert_close((p @ V[-1]).abs(), torch.tensor(1.0).double())
    r = torch.randn(7, shape[1]).double()
    more = SPEED(augmented=3, filtered=False).refined(r, W, W)
    assert torch.equal(more[:7], r) and 7 < len(more) < 7 + 3 * 7
    away = more[7:, None] - r  # of each variation, from each state
    assert ((away - (away @ p)[..., None] * p).norm(dim=2).amin(1) < 1e-9).all()


def test_the_filter_keeps_states_moved_by_more_than_the_mean():
    r, edit = torch.eye(4).double(), torch.diag(torch.tensor([1.0, 2.0, 3.0, 10.0])).double()
    assert torch.equal(most_moved(r, edit), r[3:])
    assert torch.equal(most_moved(r, torch.eye(4).double()), r)
    torch.manual_seed(0)
    assert len(SPEED(augmented=1).refined(r, edit, edit)) < len(
        SPEED(augmented=1, filtered=False).refined(r, edit, edit)
    )
    assert torch.equal(SPEED(augmented=0).refined(r, edit, edit), r), "as in the released code"


def test_the_centres_are_the_means_of_their_clusters():
    torch.manual_seed(0)
    points = torch.cat([10.0 * i + 0.1 * torch.randn(n, 2) for i, n in enumerate((5, 30, 9))])
    expected = torch.stack([part.mean(0) for part in points.split((5, 30, 9))])
    torch.testing.assert_close(centres(points, 3).sort(0)[0], expected.sort(0)[0])
    assert torch.equal(centres(points[:2], 3), points[:2])


# --- on a model -------------------------------------------------------------------------------------------------------


def test_retained_concepts_and_the_start_of_the_text_are_mapped_as_before(model):
    prompts = model.encode_prompts(["dog", "sea", "cat", "ship"]).embeds
    kept = torch.stack([prompts[0, 3], prompts[1, 3], prompts[0, 0]])  # the last word pieces, and the start of text
    erased = torch.stack([prompts[2, 3], prompts[3, 4]])
    before = mapped(model, kept), mapped(model, erased)
    with SPEED(**PLAIN).fit(model, TASK).applied_to(model):
        torch.testing.assert_close(mapped(model, kept), before[0], atol=1e-5, rtol=0)
        assert not torch.allclose(mapped(model, erased), before[1], atol=1e-2)


def test_a_small_retain_scale_makes_the_concept_act_like_its_anchor_in_the_null_space(model):
    cat, forest = model.encode_prompts(["cat", "forest"]).embeds
    task = UnlearningTask(erase=TASK.erase[:1], retain=TASK.retain)
    before, anchor = mapped(model, cat[3]), mapped(model, forest[6])

    def left(s: float) -> float:
        with SPEED(**PLAIN, retain_scale=s, lamb=0.5).fit(model, task).applied_to(model):
            return ((mapped(model, cat[3]) - anchor).norm() / (before - anchor).norm()).item()

    assert left(1e-3) < left(1.0) < left(100.0) <= 1


@pytest.mark.parametrize(("maps", "ends"), [("values", {"to_v"}), ("keys", {"to_k"}), ("both", {"to_k", "to_v"})])
def test_maps_selects_keys_values_or_both(model, maps, ends):
    weights = SPEED(**PLAIN, maps=maps).fit(model, TASK).weights
    assert {name.split(".")[-2] for name in weights} == ends


def test_without_anything_to_retain_the_null_prompt_is_retained_which_needs_lamb(model):
    nothing = UnlearningTask(erase=TASK.erase)
    settings = {"positions": "all", "retain_scale": 0.7, "threshold": 1e-9, "augmented": 0}
    with pytest.raises(UserError, match=r"method\.lamb=0\.5|method\.threshold"):
        SPEED(**settings).fit(model, nothing)
    assert SPEED(**settings | {"threshold": 0.1}, lamb=0.5).fit(model, nothing).weights


@pytest.mark.parametrize("any_pipeline", ["sd1", "sd3", "dit"], indirect=True)
def test_models_that_read_text_are_edited_and_others_refused(any_model):
    speed = SPEED(positions="all", threshold=1.0, lamb=0.5)
    if not list(any_model.text_projections()):
        with pytest.raises(UserError, match="reads no text"):
            speed.fit(any_model, TASK)
        return
    before = {name: p.detach().clone() for name, p in any_model.named_parameters().items()}
    weights = speed.fit(any_model, TASK).weights
    assert weights and all(torch.isfinite(w).all() for w in weights.values())
    assert all(not torch.equal(w, before[name]) for name, w in weights.items())

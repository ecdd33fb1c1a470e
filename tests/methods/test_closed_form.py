"""Closed-form edits: theorems of the minimiser, and the text states that represent a prompt."""

import pytest
import torch

from unlearning.methods.closed_form import closed_form, common, common_places, pairs, states
from unlearning.models.stable_diffusion import StableDiffusion


@pytest.fixture
def problem():
    torch.manual_seed(0)
    values = torch.randn(6, 8), torch.randn(3, 8), torch.randn(3, 8), torch.tensor([1.0, 2.0, 0.5])
    return [value.double() for value in values]  # W, c, c*, scale


@pytest.fixture(scope="module")
def model(sd1):
    """Its tokenizer makes one word piece of each letter, behind a start-of-text token; there are 32 positions."""
    return StableDiffusion.load(str(sd1), device="cpu")


def objective(W_new, W, c, c_star, scale, lamb):
    mapped = (scale * (c @ W_new.T - c_star @ W.T).pow(2).sum(1)).sum()
    return mapped + lamb * (W_new - W).pow(2).sum()


def test_its_gradient_is_zero(problem):
    W, c, c_star, scale = problem
    best = (W @ closed_form(c, c_star, scale, 0.5)).requires_grad_()
    objective(best, W, c, c_star, scale, 0.5).backward()
    torch.testing.assert_close(best.grad, torch.zeros_like(best), atol=1e-9, rtol=0)


@pytest.mark.parametrize("size", [1e-3, 1e-1, 10.0])
def test_no_perturbation_lowers_the_objective(problem, size):
    W, c, c_star, scale = problem
    best = W @ closed_form(c, c_star, scale, 0.5)
    lowest = objective(best, W, c, c_star, scale, 0.5)
    for _ in range(20):
        assert objective(best + size * torch.randn_like(W), W, c, c_star, scale, 0.5) > lowest


def test_a_large_lamb_changes_nothing(problem):
    _, c, c_star, scale = problem
    torch.testing.assert_close(closed_form(c, c_star, scale, 1e9), torch.eye(8).double(), atol=1e-6, rtol=0)


def test_a_small_lamb_makes_the_concept_act_like_its_anchor(problem):
    W, c, c_star, scale = problem
    edited = W @ closed_form(c, c_star, scale, 1e-9)
    torch.testing.assert_close(c @ edited.T, c_star @ W.T, atol=1e-5, rtol=0)


def test_a_retained_state_stays_where_it_was(problem):
    W, c, c_star, _ = problem
    edited = W @ closed_form(c, torch.cat([c_star[:1], c[1:]]), torch.ones(3), 1e-9)
    torch.testing.assert_close(c[1:] @ edited.T, c[1:] @ W.T, atol=1e-5, rtol=0)


def test_the_positions_of_a_prompt(model):
    row = model.encode_prompts(["cat"]).embeds[0]  # start of text, c, a, t, end of text, 27 of padding
    by_name = {name: states(model, ["cat"], name)[0] for name in ("last", "to_end", "all")}
    assert torch.equal(by_name["last"], row[3:4])
    assert torch.equal(by_name["to_end"], row[3:])
    assert torch.equal(by_name["all"], row)


def test_the_positions_of_the_null_prompt_begin_at_the_start_of_text(model):
    assert torch.equal(states(model, [""], "to_end")[0], model.encode_prompts([""]).embeds[0])


@pytest.mark.parametrize(("positions", "count"), [("last", 1), ("to_end", 32 - 6)])
def test_a_prompt_and_its_anchor_are_aligned_at_their_last_word_pieces(model, positions, count):
    c, c_star = pairs(model, ["cat"], ["forest"], positions)
    cat, forest = model.encode_prompts(["cat", "forest"]).embeds
    torch.testing.assert_close(c, cat[3 : 3 + count])
    torch.testing.assert_close(c_star, forest[6 : 6 + count])


def test_the_longer_of_a_pair_is_cut_at_its_end(model):
    c, c_star = pairs(model, ["forest", "cat"], ["cat", "forest"], "to_end")
    forest, cat = c.chunk(2)
    assert torch.equal(c_star, torch.cat([cat, forest]))


@pytest.mark.parametrize(
    ("old", "new", "shared"),
    [([1, 2, 3], [1, 9, 3], (1, 1)), ([2, 3], [9, 8, 3], (0, 1)), ([1, 2], [1, 2], (2, 0)), ([5], [6], (0, 0)),
     ([1, 1, 1], [1, 1], (2, 0))],
)  # fmt: skip
def test_common_prefix_and_suffix_of_two_texts(old, new, shared):
    assert common(old, new) == shared


def test_two_prompts_share_their_beginnings_and_their_ends(model):
    c, c_star = common_places(model, ["cat"], ["forest"])
    cat, forest = model.encode_prompts(["cat", "forest"]).embeds
    torch.testing.assert_close(c, cat[[0, *range(3, 29)]])  # both end with the letter t
    torch.testing.assert_close(c_star, forest[[0, *range(6, 32)]])


@pytest.mark.parametrize("any_pipeline", ["sd1", "pixart", "sana"], indirect=True)
def test_masked_padding_is_excluded(any_model):
    c = any_model.encode_prompts(["cat"])
    attended = int(c.extra["mask"].sum()) if "mask" in c.extra else c.embeds.shape[1]
    assert len(states(any_model, ["cat"], "all")[0]) == attended


@pytest.mark.parametrize("aligned", [lambda *texts: pairs(*texts, "to_end"), common_places])
def test_states_of_t5_are_aligned_at_their_own_beginning(sd3, tiny, aligned):
    model = tiny.FAMILIES["sd3"].load(str(sd3), device="cpu")
    prompts = ["forest cat", "forest"]
    own, other = model.text_states(model.encode_prompts(prompts))["text_encoder_3"]
    c, c_star = aligned(model, prompts[:1], prompts[1:])
    assert c.shape == c_star.shape
    torch.testing.assert_close(c[-len(own) :], own)
    torch.testing.assert_close(c_star[-len(other) :], other)


def test_many_prompts_are_encoded_in_batches(model):
    many = [f"{a}{b}" for a in "abcdefgh" for b in "abcdefghij"]
    assert len(many) > 64
    batches, one = states(model, many, "last"), states(model, many[-1:], "last")
    assert len(batches) == len(many)
    torch.testing.assert_close(batches[-1], one[0])

"""The two identities of double projections (Zhang et al., 2026)."""

import pytest
import torch

from unlearning.concepts import Concept, UnlearningTask
from unlearning.errors import UserError
from unlearning.methods.dp import DP, projector
from unlearning.models.stable_diffusion import StableDiffusion

TASK = UnlearningTask(erase=(Concept("cat"),), retain=(Concept("dog"), Concept("sea")))
LAST = {"positions": "last", "energy": 1.0, "erased_energy": 1.0}


@pytest.fixture(scope="module")
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


def maps(model) -> torch.Tensor:
    """Every map of the model, one below the other, (sum of O, D)."""
    return torch.cat([m.weight.detach().double() for _, m in model.text_projections()])


def last_states(model, *prompts: str) -> torch.Tensor:
    rows = model.encode_prompts(prompts)
    return rows.embeds[torch.arange(len(prompts)), model.last_token(prompts)].double()


def test_both_identities_and_the_update_are_the_papers(model):
    W, c, S = maps(model), last_states(model, "cat")[0], last_states(model, "", "dog", "sea").T
    anchor = S @ torch.linalg.pinv(S.T @ S) @ S.T @ c
    U_2 = torch.linalg.svd(S)[0][:, 3:]
    x = U_2.T @ c
    with DP(**LAST).fit(model, TASK).applied_to(model):
        after = maps(model)
    torch.testing.assert_close(after @ c, W @ anchor, atol=1e-5, rtol=0)
    torch.testing.assert_close(after @ S, W @ S, atol=1e-5, rtol=0)
    torch.testing.assert_close(after, W + torch.outer(W @ (anchor - c), x) / (x @ x) @ U_2.T, atol=1e-5, rtol=0)
    assert not torch.allclose(after @ c, W @ c, atol=1e-2)


def test_both_identities_hold_for_every_concept(model):
    task = UnlearningTask(erase=(Concept("cat"), Concept("ship"), Concept("bus")), retain=TASK.retain)
    W, c, S = maps(model), last_states(model, "cat", "ship", "bus"), last_states(model, "", "dog", "sea")
    anchors = c @ projector(S, 1.0)
    with DP(**LAST).fit(model, task).applied_to(model):
        torch.testing.assert_close(c @ maps(model).T, anchors @ W.T, atol=1e-5, rtol=0)
        torch.testing.assert_close(S @ maps(model).T, S @ W.T, atol=1e-5, rtol=0)


def test_to_the_end_all_states_from_the_last_word_piece_on_are_those_of_their_anchors(model):
    W, c = maps(model), model.encode_prompts(["cat"]).embeds[0, 3:].double()
    S = torch.cat([model.encode_prompts(["dog"]).embeds[0, 3:], model.encode_prompts(["sea"]).embeds[0, 3:]]).double()
    anchors = c @ projector(S, 0.9)
    with DP(energy=0.9, erased_energy=1.0, preserve_null=False).fit(model, TASK).applied_to(model):
        torch.testing.assert_close(c @ maps(model).T, anchors @ W.T, atol=1e-5, rtol=0)


def test_what_is_removed_are_the_fewest_directions_with_the_requested_share_of_it(model):
    W, c = maps(model), model.encode_prompts(["cat"]).embeds[0, 3:].double()
    S = torch.cat([model.encode_prompts([name]).embeds[0, 3:] for name in ("dog", "sea")]).double()
    outside = torch.linalg.svdvals(c - c @ projector(S, 0.5)).square()
    ranks = []
    for share in (0.5, 0.9, 1.0):
        with DP(energy=0.5, erased_energy=share, preserve_null=False).fit(model, TASK).applied_to(model):
            ranks.append(int(torch.linalg.matrix_rank(maps(model) - W, atol=1e-4)))
        held = outside.cumsum(0) / outside.sum()
        assert share == 1 or ranks[-1] == int((held < share).sum()) + 1
    assert ranks[0] < ranks[1] < ranks[2]


def test_the_projector_contains_the_requested_share_of_energy():
    S = torch.diag(torch.tensor([10.0, 1.0, 0.1, 0.0])).double()
    assert [round(projector(S, energy).trace().item()) for energy in (0.5, 0.99, 0.9999, 1.0)] == [1, 1, 2, 3]
    assert not projector(S[:0], 1.0).any()


def test_a_concept_within_what_is_preserved_is_refused(model):
    task = UnlearningTask(erase=TASK.erase, retain=(Concept("cat"),))
    with pytest.raises(UserError, match=r"method\.energy"):
        DP(energy=1.0).fit(model, task)


def test_with_nothing_to_preserve_the_concept_is_mapped_to_zero(model):
    c = last_states(model, "cat")
    with DP(**LAST, preserve_null=False).fit(model, UnlearningTask(erase=TASK.erase)).applied_to(model):
        torch.testing.assert_close(c @ maps(model).T, 0 * c @ maps(model).T, atol=1e-5, rtol=0)


@pytest.mark.parametrize("any_pipeline", ["sd1", "sd3", "dit"], indirect=True)
def test_models_that_read_text_are_edited_and_others_refused(any_model):
    if not list(any_model.text_projections()):
        with pytest.raises(UserError, match="reads no text"):
            DP().fit(any_model, TASK)
        return
    before = {name: p.detach().clone() for name, p in any_model.named_parameters().items()}
    weights = DP(energy=0.5).fit(any_model, TASK).weights
    assert weights and all(torch.isfinite(w).all() for w in weights.values())
    assert all(not torch.equal(w, before[name]) for name, w in weights.items())

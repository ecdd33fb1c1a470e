"""UCE (Gandikota et al., 2024): edited and preserved states, by default and as in the authors' scripts."""

import pytest
import torch

from unlearning.concepts import Concept, UnlearningTask
from unlearning.data.objects import emoji_objects
from unlearning.errors import UserError
from unlearning.methods.closed_form import pooled
from unlearning.methods.uce import TEMPLATES, UCE
from unlearning.models.stable_diffusion import StableDiffusion

CAT = UnlearningTask(erase=(Concept("cat", anchor="forest"),), retain=(Concept("dog"), Concept("sea")))
EXACT = {"lamb": 1e-6, "preserve_scale": 1e-9}  # the concept acts like its anchor, whatever else changes


@pytest.fixture(scope="module")
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


def mapped(model, prompt: str) -> torch.Tensor:
    """What each projection makes of a prompt's states, (L, sum of O)."""
    states = model.encode_prompts([prompt]).embeds[0]
    return torch.cat([projection(states) for _, projection in model.text_projections()], 1)


def moved(model, prompt: str, **settings) -> float:
    """How far UCE moves what the projections make of a prompt, relative to it."""
    before = mapped(model, prompt)
    with UCE(**settings).fit(model, CAT).applied_to(model):
        return ((mapped(model, prompt) - before).norm() / before.norm()).item()


@pytest.mark.parametrize("templates", [("{}",), ("{}", "a photo of the {}"), "objects", "art"])
def test_the_last_word_piece_acts_like_the_anchors(model, templates):
    anchor, before = mapped(model, "forest")[6], mapped(model, "cat")[3]
    patch = UCE(**EXACT, positions="last", templates=templates).fit(model, emoji_objects("cat"))
    with patch.applied_to(model):
        torch.testing.assert_close(mapped(model, "cat")[3], anchor, atol=1e-2, rtol=0)
    assert not torch.allclose(before, anchor, atol=1e-2)


def test_by_default_end_of_text_and_padding_act_like_the_anchors_too(model):
    anchor, before = mapped(model, "forest")[6:], mapped(model, "cat")[3:29]

    def distance(positions: str) -> float:
        with UCE(positions=positions, lamb=1e-3).fit(model, CAT).applied_to(model):
            return (mapped(model, "cat")[3:29] - anchor).norm().item()

    assert distance("to_end") < distance("last")
    assert distance("to_end") < (before - anchor).norm().item()


def test_the_authors_six_templates_begin_with_the_bare_name():
    assert all(len(six) == len(set(six)) == 6 and six[0] == "{}" for six in TEMPLATES.values())


def test_an_erase_scale_of_zero_changes_nothing(model):
    before = {name: p.detach().clone() for name, p in model.named_parameters().items()}
    for name, weight in UCE(erase_scale=0).fit(model, CAT).weights.items():
        torch.testing.assert_close(weight, before[name], atol=1e-6, rtol=0)


def test_a_larger_preserve_scale_holds_what_is_preserved(model):
    assert moved(model, "dog", preserve_scale=100.0) < moved(model, "dog", preserve_scale=1e-3) / 2
    assert moved(model, "cat", preserve_scale=1.0) > 1e-3


def test_preserve_null_decides_whether_the_null_prompt_is_preserved(model):
    assert moved(model, "", preserve_scale=100.0) < moved(model, "", preserve_scale=100.0, preserve_null=False) / 2


def test_the_preserve_scale_is_by_default_one_over_what_is_preserved(model):
    default, third = (UCE(preserve_scale=s).fit(model, CAT).weights for s in (None, 1 / 3))  # null prompt, dog, sea
    assert all(torch.equal(default[name], third[name]) for name in third)


def test_nothing_has_to_be_preserved(model):
    task = UnlearningTask(erase=CAT.erase)
    assert UCE(preserve_null=False).fit(model, task).weights


def test_several_concepts_are_erased_at_once(model):
    task = UnlearningTask(erase=(Concept("cat", anchor="sea"), Concept("dog", anchor="sky")))
    anchors = {"cat": mapped(model, "sea")[3], "dog": mapped(model, "sky")[3]}
    with UCE(**EXACT, positions="last").fit(model, task).applied_to(model):
        for name, anchor in anchors.items():
            torch.testing.assert_close(mapped(model, name)[3], anchor, atol=1e-2, rtol=0)


def test_every_family_that_reads_text_is_edited(any_model):
    uce = UCE(positions="to_end")
    if not list(any_model.text_projections()):
        with pytest.raises(UserError, match="reads no text"):
            uce.fit(any_model, CAT)
        return
    before = {name: p.detach().clone() for name, p in any_model.named_parameters().items()}
    weights = uce.fit(any_model, CAT).weights
    assert weights and all(torch.isfinite(w).all() for w in weights.values())
    assert all(not torch.equal(w, before[name]) for name, w in weights.items())


@pytest.mark.parametrize("any_pipeline", ["sd1", "sdxl", "sd3", "flux"], indirect=True)
def test_the_pooled_embedding_acts_like_the_anchors_too(any_model):
    maps = dict(any_model.pooled_projections())
    plain, patch = (UCE(**EXACT, pooled=on).fit(any_model, CAT).weights for on in (False, True))
    assert set(patch) - set(plain) == {f"{name}.weight" for name in maps}
    assert bool(maps) == ("pooled" in any_model.encode_prompts([""]).extra)
    for name, m in maps.items():
        W, (cat, forest) = patch[f"{name}.weight"], pooled(any_model, ["cat", "forest"])
        D = len(cat)
        torch.testing.assert_close(W[:, :D] @ cat, m.weight[:, :D] @ forest, atol=1e-2, rtol=0)
        assert not torch.allclose(m.weight[:, :D] @ cat, m.weight[:, :D] @ forest, atol=2e-2)
        assert torch.equal(W[:, D:], m.weight[:, D:]), "the size and crop of SDXL"

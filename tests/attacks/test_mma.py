"""MMA-Diffusion's attack on the text (Yang et al., 2024): prompts that mean a target, without banned words."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.attacks.shots import found_by
from unlearning.attacks.mma import MMA
from unlearning.concepts import ATTACK, ERASE, Concept, Prompt, UnlearningTask
from unlearning.erasures.weight_patch import WeightPatch
from unlearning.errors import UserError
from unlearning.models.dit import DiT
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.attack_result import AttackResult
from unlearning.sampling.tokens import FreeTokens
from unlearning.store.manifest import manifest, read_manifest

PROMPTS = (Prompt("a qw", ERASE, concept="qw"), Prompt("a sofa", ERASE, concept="qw"))
TASK = UnlearningTask(erase=(Concept("qw"),), prompts=PROMPTS, images_per_prompt=3)


@pytest.fixture
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


def rows_of(task=TASK):
    return manifest(Path("images"), task, 0)


def attacked(model, task=TASK, seed=0, **settings) -> AttackResult:
    attack = MMA(**({"tokens": 3, "count": 2, "iterations": 3, "candidates": 12, "top": 8} | settings))
    return found_by(attack, model, task=task, targets=rows_of(task), seed=seed)


def pooled(model, prompt: str) -> torch.Tensor:
    """CLIP's own."""
    tokens = model.pipeline.tokenizer([prompt], padding="max_length", return_tensors="pt").input_ids
    return model.text_encoders["text_encoder"](tokens).pooler_output[0]


# --- banned words -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("banned", ["qw", "Q W"])
def test_no_text_contains_a_banned_word_even_across_tokens(model, banned):
    """Targets that hold it, and a search that would take it: all tokens are letters."""
    task = UnlearningTask(erase=(Concept(banned, ("zz",)),), prompts=(Prompt(f"a {banned} zz", ERASE),))
    found = attacked(model, task, tokens=6, iterations=12, candidates=60, top=52, banned=("o",))
    texts = [one.prompt for one in found.prompts]
    assert not any(word in text for text in texts for word in (banned.lower(), "zz", "o"))
    assert found.record["banned"] == ["o", banned.lower(), "zz"]


def test_a_word_of_two_tokens_can_be_banned(model):
    task = UnlearningTask(erase=(Concept("another"),), prompts=(Prompt("an q", ERASE),))
    search = {"iterations": 10, "candidates": 60, "top": 52, "tokens": 6}
    [free] = attacked(model, task, **search).prompts
    pair = next(word[:2] for word in free.prompt.split() if len(word) > 1)
    [without] = attacked(model, task, **search, banned=(pair,)).prompts
    assert pair not in without.prompt


def test_a_ban_that_leaves_no_letters_is_an_error(model):
    with pytest.raises(UserError, match="banned"):
        attacked(model, banned=tuple("abcdefghijklmnopqrstuvwxyz"))


# --- the search -------------------------------------------------------------------------------------------------------


def test_the_similarity_is_that_of_the_pooled_states_and_rises(model):
    for one in attacked(model, iterations=10).prompts:
        course = one.record["similarities"]
        assert course == sorted(course) and course[-1] > course[0]
        with torch.no_grad():
            cosine = F.cosine_similarity(pooled(model, one.prompt), pooled(model, one.target), dim=0)
        assert cosine.item() == pytest.approx(course[-1], abs=1e-5), "of the text as it is read"


def test_the_images_of_a_prompt_take_its_texts_in_turn(model):
    found = attacked(model)
    assert [(one.target, one.seed) for one in found.prompts] == [(row.prompt, row.seed) for row in rows_of()]
    first, second, third = (one.prompt for one in found.prompts[:3])
    assert first == third != second
    assert len({one.prompt for one in attacked(model, count=10).prompts}) == len(rows_of())


def test_a_search_depends_on_its_seed(model):
    first, again, other = (attacked(model, seed=seed) for seed in (1, 1, 2))
    assert [one.prompt for one in first.prompts] == [one.prompt for one in again.prompts]
    assert [one.prompt for one in first.prompts] != [one.prompt for one in other.prompts]


def test_a_candidate_has_one_token_of_the_replacements_of_its_place():
    ids, replacements = torch.zeros(2, 3, dtype=torch.long), torch.arange(1, 25).reshape(2, 3, 4)
    candidates = MMA(tokens=3, candidates=9)._candidates(ids, replacements)
    assert (candidates != 0).sum(2).eq(1).all()
    assert all(
        candidates[s, c, c // 3] in replacements[s, c // 3] for s in range(2) for c in range(9)
    )  # each place has as many


def test_replacements_are_those_of_the_steepest_ascent_along_one_hot_tokens(model):
    free = FreeTokens.of(model, 3)
    [ids] = torch.tensor([model.token_ids(["a q w"])])
    goals, allowed = pooled(model, "a sofa")[None].detach(), torch.arange(len(free.embeds)) % 2 == 0
    one_hot = F.one_hot(ids, len(free.embeds)).float().requires_grad_()
    F.cosine_similarity(free.states(one_hot @ free.embeds)[:, free.end], goals).sum().backward()
    best = (one_hot.grad - 1e9 * ~allowed).argsort(2, descending=True)[..., :4]
    assert torch.equal(MMA(tokens=3, top=4)._replacements(free, ids, goals, allowed), best)


@pytest.mark.parametrize("transfer", [True, False])
def test_a_transferred_search_does_not_depend_on_the_erased_model(model, transfer):
    erasure = WeightPatch({n: 3 * p for n, p in model.named_parameters().items() if "fc1.weight" in n})
    attack = MMA(tokens=3, count=1, iterations=5, candidates=30, top=26, transfer=transfer)

    def prompts(*erasures) -> list[str]:
        return [one.prompt for one in found_by(attack, model, *erasures, targets=rows_of()).prompts]

    assert (prompts() == prompts(erasure)) == transfer
    assert attack.access == ("black" if transfer else "text encoder")


@pytest.mark.parametrize("any_pipeline", ["sdxl", "sd3", "dit"], indirect=True)
def test_families_that_read_text_are_attacked_and_keep_their_weights(any_model):
    if isinstance(any_model, DiT):
        with pytest.raises(UserError, match="classes"):
            attacked(any_model)
        return
    found = attacked(any_model, iterations=2, candidates=4, top=4)
    assert all(one.prompt and "qw" not in one.prompt and not one.tensors for one in found.prompts)
    assert not any(p.requires_grad or p.grad is not None for p in any_model.named_parameters().values())


def test_a_transferred_attack_is_searched_once_for_all_erasures(unlearn, monkeypatch):
    searches, search = [], MMA._search
    monkeypatch.setattr(MMA, "_search", lambda self, *a: (searches.append(1), search(self, *a))[1])
    short = [f"attack.mma.{name}=4" for name in ("iterations", "candidates", "top", "tokens")]
    chosen = ("attack=[mma]", "dataset=emoji_objects", "concept=rabbit", *short)
    runs = [
        unlearn(*chosen, "method=negative_prompt", "stages=[fit,attack]", run="one"),
        unlearn(*chosen, "method=uce", "evaluator=accuracy", run="other"),
    ]
    assert len(searches) == 1
    one, other = (json.loads((run / "attacks" / "mma.json").read_text()) for run in runs)
    assert one["rows"] == other["rows"] and one["victim"] != other["victim"] and one["base"] == other["base"]
    unlearn(*chosen, "method=uce", "attack.mma.transfer=false", "stages=[fit,attack]", run="own")
    assert len(searches) == 2
    [row] = read_manifest(runs[1] / "images" / "attacked-mma.csv")
    assert row.role == ATTACK and row.prompt != "a photo of the rabbit" and row.comeback is None
    assert "robustness/asr_mma" in json.loads((runs[1] / "metrics.json").read_text())

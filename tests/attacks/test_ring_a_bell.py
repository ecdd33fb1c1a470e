"""Ring-A-Bell (Tsai et al., 2024): tokens whose states are near those of a prompt plus the concept direction."""

from pathlib import Path

import pytest
import torch

from tests.attacks.shots import found_by
from unlearning.attacks.ring_a_bell import RingABell
from unlearning.concepts import ERASE, Concept, Prompt, UnlearningTask
from unlearning.erasures.weight_patch import WeightPatch
from unlearning.errors import UserError
from unlearning.models.dit import DiT
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.attack_result import AttackResult, restored
from unlearning.store.manifest import manifest

PROMPTS = (Prompt("a q", ERASE, concept="q"), Prompt("q on a sofa", ERASE, concept="q"))
TASK = UnlearningTask(erase=(Concept("q"),), prompts=PROMPTS, images_per_prompt=2)


@pytest.fixture
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


def rows_of(task=TASK):
    return manifest(Path("images"), task, 0)


def attacked(model, task=TASK, seed=0, **settings) -> AttackResult:
    attack = RingABell(**({"tokens": 3, "population": 8, "iterations": 3} | settings))
    return found_by(attack, model, task=task, targets=rows_of(task), seed=seed)


def states_of(found: AttackResult) -> torch.Tensor:
    return torch.stack([one.tensors["states"] for one in found.prompts])


# --- the target -------------------------------------------------------------------------------------------------------


def test_without_strength_the_soft_variant_gives_the_start(model):
    start = model.encode_prompts([prompt.text for prompt in PROMPTS]).embeds
    found = attacked(model, soft=True, eta=0)
    assert torch.equal(states_of(found), start)
    assert [one.prompt for one in found.prompts] == [prompt.text for prompt in PROMPTS]


def test_the_target_is_moved_along_the_mean_difference_of_the_pairs(model):
    def tau(*prompts):
        return model.encode_prompts(list(prompts)).embeds

    direction = (tau("q, a w", "a q in a w") - tau("a w", "a in a w")).mean(0)
    moved = tau(*(prompt.text for prompt in PROMPTS)) + 2 * direction
    found = attacked(model, soft=True, eta=2, templates=("{}, a w", "a {} in a w"))
    torch.testing.assert_close(states_of(found), moved)


def test_a_prompt_is_moved_along_the_direction_of_its_own_concept(model):
    concepts = (Concept("q"), Concept("w"))
    task = UnlearningTask(erase=concepts, prompts=tuple(Prompt("a sofa", ERASE, concept=c.name) for c in concepts))
    [alone] = states_of(attacked(model, task, soft=True))
    task = UnlearningTask(erase=concepts, prompts=(Prompt("a sofa", ERASE, concept="w"),))
    assert not torch.equal(alone, states_of(attacked(model, task, soft=True))[0])


def test_the_denoiser_gets_the_soft_states(model, tmp_path):
    found = attacked(model, soft=True)
    found.save(tmp_path / "kept")
    files = [tmp_path / "kept" / f"{i}.safetensors" for i in range(2)]
    c = restored(model, [one.prompt for one in found.prompts], [0, 1], files).encoded(model)
    assert torch.equal(c.embeds, states_of(found))


# --- the search -------------------------------------------------------------------------------------------------------


def test_tokens_are_found_whose_states_are_the_target(model):
    """With strength 0 the target is the prompt itself, and a few generations find its tokens in a vocabulary of 52."""
    task = UnlearningTask(erase=(Concept("q"),), prompts=(Prompt("a q w", ERASE, concept="q"),))
    found = attacked(model, task, eta=0, population=60, iterations=40, mutation=0.7)
    [one] = found.prompts
    assert one.prompt == "a q w" and one.record["read_back"] and one.record["losses"][-1] < 1e-6
    assert not one.tensors, "the attacked model reads the text with its own token embeddings"


def test_the_loss_falls_and_is_that_of_what_was_found(model):
    attack = RingABell(tokens=3, population=20, iterations=8, transfer=False)
    torch.manual_seed(0)
    targets = attack.observe(model, TASK, rows_of())
    found = attack.find(model, TASK, rows_of(), targets).prompts
    for one, target in zip(found, targets, strict=True):
        losses = one.record["losses"]
        assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
        states = model.encode_prompts([one.prompt]).embeds[0]
        same = (states - target).square().sum().item() == pytest.approx(losses[-1], rel=1e-4)
        assert same == one.record["read_back"]
    assert any(one.record["read_back"] for one in found)


def test_a_search_depends_on_its_seed(model):
    first, again, other = (attacked(model, seed=seed) for seed in (1, 1, 2))
    assert [one.prompt for one in first.prompts] == [one.prompt for one in again.prompts]
    assert [one.prompt for one in first.prompts] != [one.prompt for one in other.prompts]


def test_the_next_generation_is_parents_and_children_of_one_crossing(model):
    attack = RingABell(tokens=4, crossover=1, mutation=0)
    parents = torch.arange(3)[None, :, None].expand(1, 3, 4) * 10 + torch.arange(4)  # tokens 0 to 3, 10 to 13, ...
    torch.manual_seed(0)
    population = attack._next(parents, lambda *shape: torch.zeros(shape, dtype=torch.long))
    assert population.shape == (1, 9, 4) and torch.equal(population[:, :3], parents)
    assert torch.equal(population % 10, torch.arange(4).expand(1, 9, 4)), "tokens keep their places"
    assert (population // 10).diff(dim=2).ne(0).sum(2).max() == 1
    mutated = RingABell(tokens=4, crossover=0, mutation=1)._next(parents, lambda *shape: torch.full(shape, 99))
    assert (mutated == 99).sum(2).tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("transfer", [True, False])
def test_a_transferred_search_does_not_depend_on_the_erased_model(model, transfer):
    erasure = WeightPatch({n: 1.5 * p for n, p in model.named_parameters().items() if "fc1.weight" in n})
    attack = RingABell(tokens=3, population=20, iterations=10, transfer=transfer)

    def prompts(*erasures) -> list[str]:
        return [one.prompt for one in found_by(attack, model, *erasures, targets=rows_of()).prompts]

    assert (prompts() == prompts(erasure)) == transfer
    assert attack.access == ("black" if transfer else "text encoder")


@pytest.mark.parametrize("any_pipeline", ["flux", "sd3", "dit"], indirect=True)
def test_families_that_read_text_are_attacked(any_model):
    if isinstance(any_model, DiT):
        with pytest.raises(UserError, match="classes"):
            attacked(any_model)
        return
    one, _ = attacked(any_model, population=4, iterations=2).prompts
    assert not one.tensors and one.prompt
    assert attacked(any_model, soft=True, population=4, iterations=2).prompts[0].tensors["states"].isfinite().all()


def test_more_tokens_than_the_text_encoder_reads_are_refused(model):
    with pytest.raises(UserError, match="too long"):
        attacked(model, tokens=31)

"""CCE (Pham et al., 2024): a new word for a concept, learned on the erased model."""

import json
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.attacks.shots import found_by
from unlearning.attacks.base import with_placeholder
from unlearning.attacks.cce import CCE
from unlearning.concepts import ATTACK, ERASE, RETAIN, Concept, Prompt, UnlearningTask
from unlearning.erasures.guidance_edit import GuidanceEdit
from unlearning.erasures.weight_patch import WeightPatch
from unlearning.errors import UserError
from unlearning.models.guidance import Guidance, Walk
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.denoising import noised
from unlearning.sampling.guidance import ClassifierFree, NegativePrompt
from unlearning.sampling.inversion import Placeholder, first_piece
from unlearning.store.manifest import manifest, read_manifest

PROMPTS = (Prompt("a photo of the q", ERASE), Prompt("Q on a sofa", ERASE), Prompt("a dog", RETAIN))
TASK = UnlearningTask(erase=(Concept("q", anchor="dog"),), prompts=PROMPTS)  # its name is one word piece


def images(model, prompts, count):
    """In the place of Generated: images of one colour for each prompt."""
    side = model.decode(torch.zeros(1, *model.latent_shape)).shape[-1]
    colours = np.random.default_rng(len(prompts[0])).integers(0, 255, (count, 1, 1, 3), dtype=np.uint8)
    return list(np.broadcast_to(colours, (count, side, side, 3)))


def cce(**settings) -> CCE:
    short = {"iterations": 2, "batch_size": 2, "accumulate": 1, "count": 3, "initial": "a"}
    return CCE(images=images, optimizer=partial(torch.optim.AdamW, lr=0.05), **(short | settings))


def targets(task=TASK):
    return [row for row in manifest(Path("images"), task, 0) if row.role == ERASE]


def attacked(model, task=TASK, **settings):
    return found_by(cce(**settings), model, task=task, targets=targets(task))


def embeds(found, part="text_encoder") -> torch.Tensor:
    """The token embeddings of all rows, (N, L, D)."""
    return torch.stack([one.tensors[f"embeds.{part}"] for one in found.prompts])


@pytest.fixture
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


@pytest.mark.parametrize(
    ("prompt", "replaced"),
    [
        ("a photo of the cat", "a photo of the {}"),
        ("Cat, and a cat's paw", "{}, and a {}'s paw"),
        ("a catfish", "{} a catfish"),
        ("a sofa", "{} a sofa"),
    ],
)
def test_the_placeholder_replaces_the_name_or_comes_before_the_prompt(prompt, replaced):
    assert with_placeholder(prompt, "cat") == replaced


def test_the_word_stands_where_the_name_was_and_nowhere_else(model):
    found = attacked(model)
    assert [one.target for one in found.prompts] == ["a photo of the q", "Q on a sofa"]
    learned = embeds(found)
    own = model.embed(["a photo of the q", "q on a sofa"]).embeds["text_encoder"]
    changed = (learned != own).any(-1)
    assert changed.sum(1).tolist() == [1, 1]
    v, same = learned[changed]
    assert torch.equal(v, same) and not torch.equal(v, first_piece(model, "a")["text_encoder"])


def test_each_of_several_concepts_gets_a_word_of_its_own(model):
    prompts = tuple(Prompt(text, ERASE, concept=text[2:]) for text in ("a q", "a w", "o q"))
    found = attacked(model, UnlearningTask(erase=(Concept("q"), Concept("w")), prompts=prompts), iterations=5)
    first, second, third = embeds(found)[:, 2]
    assert torch.equal(first, third) and not torch.equal(first, second)
    assert found.record["losses"].keys() == {"q", "w"}


def test_a_model_denoises_the_images_better_with_the_learned_word(model):
    """With a denoiser that takes the prompt seriously: the tiny one's output hardly depends on it."""
    weights = {f"{name}.weight": 20 * m.weight for name, m in model.text_projections() if name.endswith("to_v")}
    latents = cce().latents(model, TASK)["q"]
    assert len(latents) == 6, "three, and three mirrored"

    def error(v) -> float:
        c = model.encode_prompts(Placeholder.in_prompts(model, ["a photo of a {}"]).filled(v))
        torch.manual_seed(1)
        z_0 = latents[torch.randint(len(latents), (64,))]
        z_t, t = noised(model, z_0)
        return F.mse_loss(model.predict(z_t, t, c.expand(64)), model.to_prediction(z_0, z_t, t)).item()

    with WeightPatch(weights).applied_to(model), torch.no_grad():
        found = attacked(model, iterations=60, batch_size=8)
        learned = {"text_encoder": embeds(found)[0, 1 + len("aphotoofthe")]}
        assert error(learned) < error(first_piece(model, "a")) - 5e-4


@pytest.mark.parametrize("settings", [{}, {"transfer": True}, {"prompts": ("a {}", "the {}"), "flip": False}])
def test_the_model_stays_bit_identical(model, settings):
    before = {name: p.detach().clone() for name, p in model.named_parameters().items()}
    with GuidanceEdit(NegativePrompt("q")).applied_to(model):
        attacked(model, **settings)
    after = model.named_parameters()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(p.requires_grad or p.grad is not None for p in after.values())


@pytest.mark.parametrize("any_pipeline", ["sdxl", "sd3", "dit"], indirect=True)
def test_families_that_read_text_are_attacked(any_model):
    if not any_model.text_encoders:
        with pytest.raises(UserError, match="classes"):
            attacked(any_model)
        return
    found = attacked(any_model)
    given = found.prompts[0].tensors
    assert given.keys() == {f"{kind}.{part}" for part in any_model.text_encoders for kind in ("embeds", "own")}
    assert all(e.isfinite().all() for e in given.values())


# --- through the guidance ---------------------------------------------------------------------------------------------


def test_a_changed_guidance_is_attacked_through(model):
    plain, unguided = attacked(model), attacked(model, guided=False)
    with GuidanceEdit(NegativePrompt("q")).applied_to(model):
        through = attacked(model)
        around = attacked(model, guided=False)
    assert through.record["guided"] and not plain.record["guided"] and not around.record["guided"]
    words = [embeds(found)[0] for found in (plain, unguided, around, through)]
    assert torch.equal(words[0], words[1]) and torch.equal(words[0], words[2])
    assert not torch.equal(words[0], words[3])


def test_without_a_defence_the_name_itself_needs_no_learning(model):
    """The published target; of classifier-free guidance, and a prompt and a word that are the name itself."""
    same = {"reference": "name", "prompts": ("{}",), "initial": "q"}
    with GuidanceEdit(ClassifierFree()).applied_to(model):
        assert attacked(model, **same).record["losses"]["q"]["first"] < 1e-9
    with GuidanceEdit(NegativePrompt("q")).applied_to(model):
        assert attacked(model, **same).record["losses"]["q"]["first"] > 1e-6


@dataclass(frozen=True)
class Watched(Guidance):
    """Classifier-free guidance that notes the timesteps and the steps of each of its walks."""

    walks: list = field(default_factory=list, compare=False)

    def begin(self, model, c, scale):
        seen = []
        self.walks.append(seen)
        inner = ClassifierFree().begin(model, c, scale)

        def predict(x_t, t, c, step):
            seen.append((int(t), step))
            return inner(x_t, t)

        return Walk(c, predict)


def test_a_walk_falls_within_a_window_from_the_step_that_belongs_to_its_timestep(model):
    model.guidance = guidance = Watched()
    attacked(model, walk=3, window=90, steps=50, iterations=4)
    assert len(guidance.walks) == 4
    for walk in guidance.walks:
        times, steps = zip(*walk, strict=True)
        assert len(walk) == 3 and all(a > b for a, b in pairwise(times)) and times[0] - times[-1] < 90
        assert all(b == a + 1 for a, b in pairwise(steps)) and abs(steps[0] - (1000 - times[0]) / 20) <= 1
    assert len({walk[0] for walk in guidance.walks}) > 1


# --- transfer ---------------------------------------------------------------------------------------------------------


def test_a_transferred_word_does_not_depend_on_the_erased_model(model):
    name, m = next(model.text_projections())
    erasure = WeightPatch({f"{name}.weight": 0 * m.weight})

    def word(transfer: bool, *erasures) -> torch.Tensor:
        return embeds(found_by(cce(transfer=transfer), model, *erasures, targets=targets()))

    assert torch.equal(word(True), word(True, erasure))
    assert not torch.equal(word(False), word(False, erasure))
    assert (cce(transfer=True).access, cce().access) == ("black", "white")


# --- the command line -------------------------------------------------------------------------------------------------


def test_a_run_of_several_attacks_generates_and_measures(unlearn):
    short = [f"attack.cce.{name}=2" for name in ("iterations", "batch_size", "count")]
    short += [f"attack.ring_a_bell.{name}=4" for name in ("iterations", "population", "tokens")]
    run = unlearn("attack=[cce,ring_a_bell]", *short, "dataset=emoji_objects", "concept=rabbit", "evaluator=accuracy")
    [row] = read_manifest(run / "images" / "attacked-cce.csv")
    assert row.role == ATTACK and row.comeback and row.prompt == "a photo of the x"
    [found] = read_manifest(run / "images" / "attacked-ring_a_bell.csv")
    assert found.role == ATTACK and not found.comeback and found.prompt
    metrics = json.loads((run / "metrics.json").read_text())
    assert {"robustness/asr_cce", "robustness/asr_before_cce", "robustness/asr_ring_a_bell"} <= metrics.keys()
    record = json.loads((run / "attacks" / "cce.json").read_text())
    assert record["access"] == "white" and record["targets"] == 1 and record["cost"]["seconds"] >= 0
    assert [found["prompt"] for found in record["rows"]] == ["a photo of the x"]

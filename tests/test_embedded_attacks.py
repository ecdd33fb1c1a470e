"""Attacks on the embedded models, as shipped."""

from pathlib import Path

import pytest
import torch

import unlearning
from tests.attacks.shots import found_by
from unlearning.attacks.inversion import Inversion
from unlearning.attacks.recall import Recall
from unlearning.attacks.witness import pixels
from unlearning.concepts import ERASE, Concept, Prompt, UnlearningTask
from unlearning.judges.emoji import EmojiJudge
from unlearning.methods.none import Unedited
from unlearning.methods.oracle import Oracle
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.attack_result import attacked
from unlearning.sampling.sampler import Sampler
from unlearning.store.manifest import manifest

WEIGHTS = Path(unlearning.__file__).parent / "weights"
CAT = UnlearningTask(
    erase=(Concept("cat"),), prompts=(Prompt("a photo of the cat", ERASE, {"object": "cat"}),), images_per_prompt=2
)


@torch.no_grad()
def test_inversion_and_back_returns_the_image(tmp_path):
    model = StableDiffusion.load(str(WEIGHTS / "emoji_unet"), device="cpu")
    rows, sampler = manifest(Path("images"), CAT, 0), Sampler(steps=10)
    attack = Inversion(images=sampler, steps=10)
    found_by(attack, model, task=CAT, targets=rows).save(tmp_path / "kept")
    images, _ = sampler.draw(model, rows)
    again, _ = attack.sampler(sampler).draw(model, attacked(tmp_path / "kept", rows))
    coded = model.decode(model.encode_images(images))
    returned, autoencoder = (-10 * (own - images).square().mean((1, 2, 3)).log10() for own in (again, coded))
    assert returned.min() > 25, "decibels"
    assert (autoencoder - returned).max() < 1, "the rest is the autoencoder's"


@pytest.mark.parametrize(
    ("method", "shown"), [(Unedited(), 2), (Oracle(path=str(WEIGHTS / "emoji_unet_without_cat")), 0)]
)
def test_an_attack_succeeds_on_the_unedited_model_and_finds_nothing_in_one_that_never_knew(method, shown, tmp_path):
    """RECALL, whose image prompt holds the concept, on the two controls."""
    model = StableDiffusion.load(str(WEIGHTS / "emoji_unet"), device="cpu")
    rows, sampler = manifest(Path("images"), CAT, 0), Sampler(steps=10)
    attack, erasure = Recall(images=sampler, iterations=1, step_size=0.005), method.fit(model, CAT)
    found_by(attack, model, erasure, task=CAT, targets=rows).save(tmp_path / "kept")
    with torch.no_grad(), erasure.applied_to(model):
        images, _ = attack.sampler(sampler).draw(model, attacked(tmp_path / "kept", rows))
    names, probabilities = EmojiJudge(WEIGHTS / "judge" / "classifier")(pixels(images), "object")
    assert sum(names[i] == "cat" for i in probabilities.argmax(1).tolist()) == shown

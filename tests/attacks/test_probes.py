"""The probes of When Are Concepts Erased?, and RECALL: inputs of the erased model, and sampling from them."""

from functools import partial

import numpy as np
import pytest
import torch

from tests.attacks.shots import TASK, found_by, rows
from unlearning.attacks.base import settings_for
from unlearning.attacks.classifier_guidance import ClassifierGuidance, Observed
from unlearning.attacks.completion import Completion
from unlearning.attacks.inpainting import Inpainting
from unlearning.attacks.inversion import Inversion
from unlearning.attacks.noise import Noise
from unlearning.attacks.recall import Recall
from unlearning.erasures.guidance_edit import GuidanceEdit
from unlearning.erasures.weight_patch import WeightPatch
from unlearning.errors import UserError
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.attack_result import attacked
from unlearning.sampling.guidance import NegativePrompt
from unlearning.sampling.sampler import Sampler

SAMPLER = Sampler(steps=4, guidance_scale=2.0, batch_size=2)


@pytest.fixture
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


@pytest.fixture
def erasure(model):
    return WeightPatch({f"{name}.weight": 2 * m.weight for name, m in model.text_projections()})


def generated(attack, model, folder, erasure=None):
    """The attacked images, by the erased model."""
    found_by(attack, model, erasure).save(folder / "kept")
    asked = attacked(folder / "kept", rows())
    if erasure is None:
        return attack.sampler(SAMPLER).draw(model, asked)[0]
    with erasure.applied_to(model):
        return attack.sampler(SAMPLER).draw(model, asked)[0]


def test_a_model_that_continues_its_own_latents_generates_its_usual_image(model, erasure, tmp_path):
    own = SAMPLER.draw(model, rows())[0]
    torch.testing.assert_close(generated(Completion(images=SAMPLER, begun=0.5), model, tmp_path), own)


def test_the_erased_model_continues_from_the_latents_of_the_unedited_model(model, erasure, tmp_path):
    own = SAMPLER.draw(model, rows())[0]
    with erasure.applied_to(model):
        erased = SAMPLER.draw(model, rows())[0]
    few, most = (
        generated(Completion(images=SAMPLER, begun=share), model, tmp_path / str(share), erasure)
        for share in (0.25, 0.75)
    )
    assert (most - own).abs().mean() < (few - own).abs().mean() < (erased - own).abs().mean()


def test_inpainting_keeps_the_border_and_judges_the_centre(model, erasure, tmp_path):
    attack = Inpainting(images=SAMPLER)
    [found, _] = found_by(attack, model, erasure).prompts
    assert found.judged == (4, 4, 12, 12), "of 16 pixels"
    images = generated(attack, model, tmp_path, erasure)
    with torch.no_grad():
        latents = model.encode_images(images)
    [row, _] = attacked(tmp_path / "kept", rows())
    assert [region.box for region in row.regions] == [(4, 4, 12, 12)] and row.regions[0].labels == row.labels
    path = list(attack.sampler(SAMPLER).trajectory(
        model, model.noise([1]), lambda x, t: torch.zeros_like(x), [{"image": found.tensors["image"]}]
    ))  # fmt: skip
    border = torch.ones(8, 8, dtype=torch.bool)
    border[2:6, 2:6] = False
    torch.testing.assert_close(path[-1][1][0][:, border], found.tensors["image"][:, border])
    assert latents.isfinite().all()


def test_noise_with_eta_0_equals_the_sampler_and_larger_eta_differs(model, tmp_path):
    own = SAMPLER.draw(model, rows())[0]
    none = generated(Noise(etas=(1e-9,), scales=(1.0,)), model, tmp_path / "none")
    torch.testing.assert_close(none, own, atol=1e-3, rtol=0)
    much = generated(Noise(etas=(1.85,), scales=(1.04,)), model, tmp_path / "much")
    assert much.isfinite().all() and (much - own).abs().max() > 1e-2


@pytest.mark.parametrize(("count", "settings"), [(5, [1, 2, 3, 1, 2]), (3, [1, 2, 3]), (2, [1, 3]), (1, [1])])
def test_images_take_the_settings_in_turn_and_fewer_images_from_the_first_to_the_last(count, settings):
    assert settings_for([1, 2, 3], count) == settings


def test_the_settings_that_were_used_are_recorded(model):
    found = found_by(Noise(etas=(1.0, 1.2, 1.5), scales=(1.0,)), model)
    assert [one.record["eta"] for one in found.prompts] == [1.0, 1.5] and found.record["settings"] == 2


@pytest.mark.parametrize("any_pipeline", ["sd3", "pixart"], indirect=True)
def test_noise_is_refused_before_the_fit_where_steps_are_not_ddims(any_model):
    with pytest.raises(UserError, match="DDIM"):
        Noise().check_rows(any_model, rows())


def test_recall_without_iterations_is_image_to_image_from_the_reference(model):
    reference = Recall(images=SAMPLER, iterations=0)
    observed = reference.observe(model, TASK, rows())
    found = found_by(reference, model).prompts
    torch.testing.assert_close(torch.stack([one.tensors["image"] for one in found]), observed)


def test_recall_adds_the_reference_after_every_fifth_timestep_from_the_least_noisy_on(model, monkeypatch):
    images = Sampler(steps=10, guidance_scale=2.0, batch_size=2)
    attacks = [Recall(images=images, iterations=1, step_size=1e-9, pull=pull) for pull in (0.0, 0.05)]
    r, times, predict = attacks[0].observe(model, TASK, rows()), [], model.predict
    monkeypatch.setattr(model, "predict", lambda z, t, c: times.append(int(t.flatten()[0])) or predict(z, t, c))
    found = [found_by(attack, model).prompts for attack in attacks]
    without, pulled = (torch.stack([one.tensors["image"] for one in prompts]) for prompts in found)
    torch.testing.assert_close(pulled - without, 2 * 0.05 * r, atol=1e-5, rtol=0)
    assert times[-20::2] == [50 + 100 * i for i in range(10)]


def test_recall_goes_through_a_changed_guidance(model):
    def moved(*erasures):
        found = found_by(Recall(images=SAMPLER, iterations=1, step_size=0.01), model, *erasures)
        return found.prompts[0].tensors["image"]

    assert not torch.equal(moved(), moved(GuidanceEdit(NegativePrompt("q"))))


def test_recall_goes_up_or_down_from_one_start(model):
    up, down = (
        found_by(Recall(images=SAMPLER, iterations=1, step_size=0.01, ascend=ascend), model).prompts[0].tensors["image"]
        for ascend in (True, False)
    )
    assert not torch.equal(up, down)


def test_strength_decides_where_the_trajectory_begins():
    starts = {share: Recall(images=SAMPLER, strength=share).sampler(SAMPLER).start for share in (1.0, 0.5, 0.01)}
    assert starts == {1.0: 0, 0.5: 2, 0.01: 3}


def test_a_classifier_recognises_the_concept_in_noisy_latents(model):
    attack = ClassifierGuidance(images=None, optimizer=partial(torch.optim.AdamW, lr=1e-3), epochs=10, batch_size=32)
    torch.manual_seed(0)
    shown = 2 + torch.randn(32, *model.latent_shape)
    record = attack.find(model, TASK, rows(), Observed(shown, -shown)).record
    assert record["loss"] < 0.5 * record["first loss"]


def test_a_classifier_moves_the_images(model, tmp_path):
    def images(model, prompts, count):
        side = model.decode(torch.zeros(1, *model.latent_shape)).shape[-1]
        return [np.full((side, side, 3), 250 if "q" in prompts[0] else 5, np.uint8)] * count

    adam = partial(torch.optim.AdamW, lr=1e-3)
    attack = ClassifierGuidance(images=images, optimizer=adam, count=8, epochs=2, batch_size=16, scales=(100.0,))
    moved = generated(attack, model, tmp_path)
    assert (tmp_path / "kept" / "shared.safetensors").exists()
    assert moved.isfinite().all() and not torch.equal(moved, SAMPLER.draw(model, rows())[0])


def test_classifier_guidance_with_noise_takes_noisy_steps(model, tmp_path):
    """With a negligible scale it is the noise probe."""

    def images(model, prompts, count):
        side = model.decode(torch.zeros(1, *model.latent_shape)).shape[-1]
        return [np.full((side, side, 3), 250 if "q" in prompts[0] else 5, np.uint8)] * count

    adam = partial(torch.optim.AdamW, lr=1e-3)
    settings = {"images": images, "optimizer": adam, "count": 2, "epochs": 1, "batch_size": 16, "scales": (1e-6,)}
    both = generated(ClassifierGuidance(**settings, etas=(1.5,)), model, tmp_path / "both")
    noise = generated(Noise(etas=(1.5,), scales=(1.0,)), model, tmp_path / "noise")
    torch.testing.assert_close(both, noise, atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    "attack",
    [
        Completion(images=SAMPLER),
        Inpainting(images=SAMPLER),
        Noise(),
        Recall(images=SAMPLER),
        Inversion(images=SAMPLER),
    ],
)
def test_attacked_images_take_the_evaluations_batch_size(attack):
    """If it is automatic, it is lowered where memory is short."""
    for size in (3, "auto"):
        sampler = Sampler(batch_size=size)
        own = attack.sampler(sampler)
        assert (own.batch_size, own.automatic) == (sampler.batch_size, size == "auto")

"""Inversion: finds the noise from which the sampler generates a given image."""

import pytest
import torch

from tests import tiny
from tests.attacks.shots import TASK, found_by, rows
from unlearning.attacks.inversion import Inversion
from unlearning.erasures.weight_patch import WeightPatch
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.attack_result import Restored, attacked
from unlearning.sampling.guidance import begin
from unlearning.sampling.inverse import noise_of
from unlearning.sampling.sampler import Sampler, denoise

SAMPLER = Sampler(steps=2, guidance_scale=2.0, batch_size=2)


@pytest.fixture
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


def last(path):
    return list(path)[-1][1]


@torch.no_grad()
def there_and_back(model, refinements: int, solver: str = "fixed_point", steps: int = 6, **settings) -> float:
    """The largest error of latents after inversion and sampling."""
    torch.manual_seed(0)
    c, x_0 = model.encode_prompts(["a q", "z"]), torch.randn(2, *model.latent_shape)
    noise = noise_of(model, x_0, begin(model, c, 1.0), steps=steps, refinements=refinements, solver=solver, **settings)
    return (last(denoise(model, noise, begin(model, c, 1.0), steps=steps)) - x_0).abs().max().item()


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_inversion_and_back_returns_the_latents(family, tmp_path):
    """A prediction of noise, and a flow."""
    model = tiny.FAMILIES[family].load(str(tiny.save(family, tmp_path)), device="cpu")
    assert there_and_back(model, 20) < 0.01 * there_and_back(model, 0)


def test_a_descent_finds_the_same_noise_slowly(model):
    plain = there_and_back(model, 0, steps=4)
    descended = there_and_back(model, 10, "descent", steps=4, learning_rate=0.05)
    assert descended < plain / 2


def test_the_sampler_uses_the_result_of_the_attack(model, tmp_path):
    attack = Inversion(images=SAMPLER, steps=2, guidance_scale=2.0)
    found = found_by(attack, model)
    found.save(tmp_path / "kept")
    drawn, _ = attack.sampler(SAMPLER).draw(model, attacked(tmp_path / "kept", rows()))
    noise = torch.stack([one.tensors["latents"] for one in found.prompts])
    expected, _ = Sampler(steps=2, guidance_scale=2.0).sample(model, Restored(["", ""], noise))
    torch.testing.assert_close(drawn, expected)


def test_white_box_inverts_with_the_erased_model_and_black_box_does_not(model):
    weights = {f"{name}.weight": 2 * m.weight for name, m in model.text_projections()}
    erasure = WeightPatch(weights)

    def noise(transfer: bool, *erasures):
        found = found_by(Inversion(images=SAMPLER, steps=2, transfer=transfer), model, *erasures)
        return torch.stack([one.tensors["latents"] for one in found.prompts])

    assert torch.equal(noise(True), noise(True, erasure))
    assert not torch.equal(noise(False), noise(False, erasure))
    assert Inversion(images=SAMPLER, transfer=True).access == "black"


def test_the_record_distinguishes_noise_from_other_latents(model):
    found = found_by(Inversion(images=SAMPLER, steps=2), model)
    assert found.record["nll of noise"] == pytest.approx(1.42, abs=0.1), "half of 1 + log 2 pi"
    assert all(one.record["nll"] > 0 for one in found.prompts) and found.record["wasserstein"] >= 0
    assert [one.seed for one in found.prompts] == [row.seed for row in rows(TASK)]


def test_the_prompt_of_the_inversion_is_that_of_the_sampling(model):
    prompts = {kind: found_by(Inversion(images=SAMPLER, steps=2, prompt=kind), model) for kind in ("own", "empty")}
    assert [one.prompt for one in prompts["own"].prompts] == [row.prompt for row in rows()]
    assert {one.prompt for one in prompts["empty"].prompts} == {""}

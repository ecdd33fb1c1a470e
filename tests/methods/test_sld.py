"""SLD's theorems (Schramowski et al., 2023, eqs. 3 to 8)."""

from dataclasses import replace

import pytest
import torch

from unlearning.concepts import Concept, UnlearningTask
from unlearning.erasures.guidance_edit import GuidanceEdit
from unlearning.methods.sld import SLD, SafetyGuidance
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.attack_result import Restored
from unlearning.sampling.guidance import ClassifierFree, branches
from unlearning.sampling.sampler import Sampler, denoise, per_row, skim

PROMPTS = ["a photo of a cat", "a dog", "a ship on the sea"]
SEEDS = [1, 2, 3]
STRONG = SafetyGuidance("cat", 1, 2000.0, 0.025, 0.5, 0.7)


@pytest.fixture(scope="module")
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal within rounding, which depends on the number of rows in a call of the denoiser."""
    return torch.allclose(a, b, atol=2e-5, rtol=0)


def predictions(model, guidance, how=denoise, steps=6, scale=7.5, prompts=PROMPTS, seeds=SEEDS) -> list[torch.Tensor]:
    """What the guidance predicts at each step of a trajectory of classifier-free guidance."""
    c = model.encode_prompts(prompts)
    walk, seen = guidance.begin(model, c, scale), []
    plain = ClassifierFree().begin(model, c, scale)

    class Both:
        def __call__(self, x_t, t):
            seen.append(walk(x_t, t))
            return plain(x_t, t)

        def skip(self):
            walk.skip()
            plain.skip()

    for _ in how(model, model.noise(seeds), Both(), steps=steps):
        pass
    return seen


def test_a_mask_of_zeros_is_classifier_free_guidance(model):
    nothing = replace(STRONG, warmup_steps=0, threshold=-torch.inf)
    plain = Sampler(steps=4)(model, PROMPTS, SEEDS)
    with GuidanceEdit(nothing).applied_to(model):
        assert close(Sampler(steps=4)(model, PROMPTS, SEEDS), plain)
    with GuidanceEdit(STRONG).applied_to(model):
        assert not close(Sampler(steps=4)(model, PROMPTS, SEEDS), plain)


def test_the_recursion_is_the_papers(model):
    """A plain loop over elements: momentum grows during the warm-up, and gamma acts after it."""
    s, s_S, lamb, s_m, beta, delta, steps = 7.5, 2000.0, 0.025, 0.5, 0.7, 2, 5
    null, safety, c = (model.encode_prompts(text) for text in ([""], ["cat"], PROMPTS[:1]))
    guided = predictions(model, replace(STRONG, warmup_steps=delta), steps=steps, prompts=PROMPTS[:1], seeds=SEEDS[:1])
    nu = [0.0] * guided[0].numel()
    path = denoise(model, model.noise(SEEDS[:1]), ClassifierFree().begin(model, c, s), steps=steps)
    for i, ((t, x_t), after) in enumerate(zip(path, guided, strict=False)):
        eps_0, eps_S, eps_c = (e.double().flatten().tolist() for e in branches(model, x_t, t, null, safety, c))
        expected = []
        for j in range(len(nu)):
            difference = eps_c[j] - eps_S[j]
            mu = min(1.0, s_S * abs(difference)) if difference < lamb else 0.0
            gamma = mu * (eps_S[j] - eps_0[j]) + s_m * nu[j]
            nu[j] = beta * nu[j] + (1 - beta) * gamma
            expected.append(eps_0[j] + s * (eps_c[j] - eps_0[j] - (gamma if i >= delta else 0.0)))
        torch.testing.assert_close(after.flatten().double(), torch.tensor(expected).double(), atol=1e-5, rtol=1e-5)
    assert max(map(abs, nu)) > 0


def test_the_warm_up_is_classifier_free_guidance_in_which_the_momentum_grows(model):
    plain = predictions(model, ClassifierFree())
    warm = predictions(model, replace(STRONG, warmup_steps=3))
    assert all(close(a, b) for a, b in zip(warm[:3], plain[:3], strict=True))
    fresh = predictions(model, replace(STRONG, warmup_steps=3, momentum_scale=0.0))
    assert not close(warm[3], plain[3])
    assert not close(warm[3], fresh[3]), "by the momentum of the steps before"


@pytest.mark.parametrize("steps", [4, 12])
def test_the_warm_up_counts_sampling_steps_also_where_predictions_are_skipped(model, steps):
    """skim takes predictions at steps 0, 5 and 10: a warm-up of 6 steps ends before the one at 10."""
    guidance = replace(STRONG, warmup_steps=6)
    guided, plain = (predictions(model, g, skim, steps) for g in (guidance, ClassifierFree()))
    assert [close(a, b) for a, b in zip(guided, plain, strict=True)] == [True, True, False][: -(-steps // 5)]


def test_rows_do_not_change_each_other_whatever_their_guidance_scale(model):
    scales = [7.5, 3.0, 1.0]
    with GuidanceEdit(STRONG).applied_to(model):
        sample = Sampler(steps=4).sample
        together, _ = sample(model, Restored(PROMPTS, model.noise(SEEDS)), scales)
        for i in range(3):
            row = slice(i, i + 1)
            alone, _ = sample(model, Restored(PROMPTS[row], model.noise(SEEDS[row])), scales[row])
            torch.testing.assert_close(together[i : i + 1], alone, atol=2e-5, rtol=0)


def test_a_scale_of_each_row_is_the_scale_of_all_when_they_agree(model):
    one, each = (predictions(model, STRONG, scale=s) for s in (3.0, per_row(torch.full((3,), 3.0))))
    assert all(torch.equal(a, b) for a, b in zip(one, each, strict=True))


def test_one_call_of_the_denoiser_a_step(model):
    calls = []
    hook = model.denoiser.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    with GuidanceEdit(STRONG).applied_to(model):
        Sampler(steps=4)(model, PROMPTS, SEEDS)
    hook.remove()
    assert calls == [3 * len(PROMPTS)] * 4


def test_it_draws_what_diffusers_draws(model):
    diffusers = pytest.importorskip("diffusers.pipelines.deprecated.stable_diffusion_safe")
    method = SLD(warmup_steps=1, safety_scale=2000.0, threshold=0.025, momentum_scale=0.5, momentum_beta=0.7)
    erasure = method.fit(model, UnlearningTask(erase=(Concept("cat"), Concept("dog"))))
    with erasure.applied_to(model):
        ours = Sampler(steps=4)(model, PROMPTS[:1], SEEDS[:1])
    parts = {name: part for name, part in model.pipeline.components.items() if name != "safety_checker"}
    theirs = diffusers.StableDiffusionPipelineSafe(**parts, safety_checker=None, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    theirs.safety_concept = "cat, dog"
    images = theirs(
        PROMPTS[0], num_inference_steps=4, output_type="np", generator=torch.Generator().manual_seed(SEEDS[0]),
        sld_warmup_steps=1, sld_guidance_scale=2000.0, sld_threshold=0.025, sld_momentum_scale=0.5, sld_mom_beta=0.7,
    ).images  # fmt: skip
    torch.testing.assert_close(ours, torch.from_numpy(images).permute(0, 3, 1, 2), atol=1e-4, rtol=0)


def test_an_edit_of_the_text_does_not_hide_the_safety_concept(model):
    def to_nothing(model, text, c):
        return replace(c, embeds=torch.zeros_like(c.embeds))

    c, x, t = model.encode_prompts(PROMPTS[:1]), model.noise([1]), torch.tensor(500)
    try:
        model.text_edits = (to_nothing,)
        cat, nothing = (
            replace(STRONG, warmup_steps=0, concept=concept).begin(model, c, 7.5)(x, t) for concept in ("cat", "")
        )
    finally:
        model.text_edits = ()
    assert not torch.equal(cat, nothing)


def test_a_configured_safety_concept_replaces_the_tasks(model):
    task = UnlearningTask(erase=(Concept("cat"), Concept("dog")))
    assert SLD().fit(model, task).guidance.concept == "cat, dog"
    assert SLD(concept="violence").fit(model, task).guidance.concept == "violence"

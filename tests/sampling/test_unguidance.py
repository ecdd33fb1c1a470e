"""UnGuide's analysis and guidance (arXiv:2508.05755): D(p) computed plainly, and w at its extremes."""

from dataclasses import dataclass, replace

import pytest
import torch

from tests.tiny import FAMILIES
from unlearning.erasures.base import Erasure
from unlearning.erasures.module_edit import Adapter
from unlearning.errors import UserError
from unlearning.models.guidance import Guidance, Walk
from unlearning.sampling.attack_result import Restored
from unlearning.sampling.guidance import ClassifierFree
from unlearning.sampling.sampler import Sampler
from unlearning.sampling.unguidance import LatentDifference, UnGuidance, blended
from unlearning.training.student import LoRA

PROMPTS = ["a photo of the cat", "a photo of the dog", ""]


@pytest.fixture(scope="module", params=["sd1", "sd3"])
def model(request):
    """A prediction of noise, and a flow."""
    return FAMILIES[request.param].load(str(request.getfixturevalue(request.param)), device="cpu")


@pytest.fixture(scope="module")
def adapter(model) -> Adapter:
    torch.manual_seed(0)
    with LoRA(r"attn2\.to_(k|v)$|add_(k|v)_proj$", rank=2).of(model) as lesson, torch.no_grad():
        for p in lesson.parameters.values():
            p.normal_(std=0.3)
        return lesson.erasure()


# --- D(p) -------------------------------------------------------------------------------------------------------------


def plainly(model, adapter, prompt: str, seed: int, settings: LatentDifference, scale: float) -> float:
    """One summand of D, of one prompt and one repeat, written out."""
    scheduler = model.solver.from_config(model.scheduler.config)
    model.set_timesteps(scheduler, settings.steps)
    times = scheduler.timesteps[1:] if settings.schedule == "paper" else scheduler.timesteps
    z, c, null = model.noise([seed]), model.encode_prompts([prompt]), model.encode_prompts([""])
    with torch.no_grad():
        for t in times[: settings.stop]:
            eps_0, eps_c = model.predict(z, t, null), model.predict(z, t, c)
            z = scheduler.step(eps_0 + scale * (eps_c - eps_0), t, z).prev_sample
        if settings.schedule == "paper":
            t = torch.randint(940, 960, (), generator=torch.Generator().manual_seed(seed))
        else:
            t = times[settings.stop]
        base = model.predict(z, t, c)
        with adapter.applied_to(model):
            return float((model.predict(z, t, c) - base).norm())


@pytest.mark.parametrize("schedule", ["paper", "diffusers"])
def test_the_difference_is_that_of_one_prompt_and_one_repeat_at_a_time(model, adapter, schedule):
    settings = LatentDifference(repeats=2, stop=3, schedule=schedule, batch_size=4)
    if schedule == "paper" and model.prediction_type == "flow":
        with adapter.applied_to(model), pytest.raises(UserError, match="schedule=diffusers"):
            settings.summands(model, adapter.digest, model.encode_prompts(PROMPTS), 7.5)
        return
    expected = [[plainly(model, adapter, p, settings.seed + r, settings, 7.5) for r in range(2)] for p in PROMPTS]
    with adapter.applied_to(model):
        found = settings.summands(model, adapter.digest, model.encode_prompts(PROMPTS), 7.5)
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-7)


def test_all_prompts_and_repeats_share_batches(model, adapter):
    calls = []
    with adapter.applied_to(model):
        hook = model.denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
        try:
            LatentDifference(repeats=4, stop=3, schedule="diffusers", batch_size=16).summands(
                model, adapter.digest, model.encode_prompts(PROMPTS), 7.5
            )
        finally:
            hook.remove()
    assert len(calls) == 5, "three steps and two questions, for twelve rows at once"


def test_each_prompt_is_analysed_once(model, adapter):
    rule, calls = UnGuidance(threshold=0.0, repeats=2, stop=3, schedule="diffusers").of(adapter.digest), []
    with adapter.applied_to(model):
        first = rule.differences(model, model.encode_prompts(PROMPTS), 7.5)
        hook = model.denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
        try:
            again = rule.differences(model, model.encode_prompts(PROMPTS[::-1]), 7.5)
            assert not calls and torch.equal(again, first.flip(0))
            rule.differences(model, model.encode_prompts(PROMPTS[:1]), 5.0)
            assert calls, "another scale is another question"
            side = 2 * Sampler(steps=1)(model, PROMPTS[:1], [0]).shape[-1]
            calls.clear()
            rule.differences(model.at_size(side, None), model.encode_prompts(PROMPTS[:1]), 5.0)
            assert calls, "so is another size"
        finally:
            hook.remove()


# --- w ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fixed(Guidance):
    """UnGuidance's blend at weights of the test's own."""

    adapter: Adapter
    w: torch.Tensor

    def begin(self, model, c, scale):
        null = model.encode_prompts([""])
        return Walk(c, lambda x_t, t, c, _: blended(model, self.adapter.digest, self.w, x_t, t, c, null, scale))


def generated(model, rule, prompts=PROMPTS) -> torch.Tensor:
    before, model.guidance = model.guidance, rule
    try:
        return Sampler(steps=2)(model, prompts, list(range(len(prompts))))
    finally:
        model.guidance = before


def test_w_0_is_the_adapter_alone_and_w_1_the_base_model_bit_for_bit(model, adapter):
    base = generated(model, ClassifierFree())
    with adapter.applied_to(model):
        unlearned = generated(model, ClassifierFree())
        assert torch.equal(generated(model, Fixed(adapter, torch.zeros(3))), unlearned)
        assert torch.equal(generated(model, Fixed(adapter, torch.ones(3))), base)
    assert not torch.equal(base, unlearned)


def test_the_blend_is_the_papers_formula(model, adapter):
    x_t, t, s = model.noise([1, 2]), torch.tensor(500), 7.5
    c, null, w = model.encode_prompts(PROMPTS[:2]), model.encode_prompts(["", ""]), torch.tensor([-1.0, 2.0])

    def cfg() -> torch.Tensor:
        eps_0, eps_c = model.predict(x_t, t, null), model.predict(x_t, t, c)
        return eps_0 + s * (eps_c - eps_0)

    with torch.no_grad():
        base = cfg()
        with adapter.applied_to(model):
            unlearned = cfg()
            blend = blended(model, adapter.digest, w, x_t, t, c, null, s)
    expected = torch.stack([2 * unlearned[0] - base[0], 2 * base[1] - unlearned[1]])
    torch.testing.assert_close(blend, expected, rtol=1e-4, atol=1e-4)


def test_a_batch_of_mixed_w_is_its_rows_one_by_one(model, adapter):
    w = torch.tensor([-1.0, 2.0, 0.5])
    with adapter.applied_to(model):
        together = generated(model, Fixed(adapter, w))
        for i in range(3):
            before, model.guidance = model.guidance, Fixed(adapter, w[i : i + 1])
            alone = Sampler(steps=2)(model, PROMPTS[i : i + 1], [i])
            model.guidance = before
            torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-4)


def test_prompts_above_the_threshold_are_the_concepts(model, adapter):
    with adapter.applied_to(model):
        D = (
            UnGuidance(threshold=0.0, repeats=2, stop=3, schedule="diffusers")
            .of(adapter.digest)
            .differences(model, model.encode_prompts(PROMPTS), 7.5)
        )
        highest = int(D.argmax())
        rule = UnGuidance(
            threshold=float(D.sort().values[-2:].mean()), repeats=2, stop=3, schedule="diffusers", w_1=-3.0, w_2=4.0
        )
        decisions = rule.of(adapter.digest).begin(model, model.encode_prompts(PROMPTS), 7.5).decisions
    assert decisions["w"] == [-3.0 if i == highest else 4.0 for i in range(3)]
    torch.testing.assert_close(torch.tensor(decisions["D"]), D)
    exactly = UnGuidance(threshold=float(D[0]), repeats=2, stop=3, schedule="diffusers")
    with adapter.applied_to(model):
        w = exactly.of(adapter.digest).begin(model, model.encode_prompts(PROMPTS), 7.5).decisions["w"]
    assert w[0] == 2.0, "strictly above"


def test_rows_may_have_their_own_scales(model, adapter):
    seeds, scales = [1, 2], [3.0, 9.0]
    whole = replace(adapter, guidance=UnGuidance(threshold=0.0, repeats=2, stop=3, schedule="diffusers"))
    with whole.applied_to(model):
        together, decided = Sampler(steps=2).sample(model, Restored(PROMPTS[:2], model.noise(seeds)), scales)
        for i in range(2):
            alone, own = Sampler(steps=2, guidance_scale=scales[i]).sample(
                model, Restored(PROMPTS[i : i + 1], model.noise(seeds[i : i + 1]))
            )
            torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-4)
            assert own[0]["D"] == pytest.approx(decided[i]["D"], rel=1e-4)


def test_it_is_saved_with_its_adapter(model, adapter, tmp_path):
    whole = replace(adapter, guidance=UnGuidance(threshold=1.5, repeats=2, stop=3, schedule="diffusers", w_2=3.0))
    whole.save(tmp_path, base=model)
    again = Erasure.load(tmp_path)
    assert again.guidance == whole.guidance and again.digest == whole.digest
    assert "load_lora_weights" in (tmp_path / "README.md").read_text()

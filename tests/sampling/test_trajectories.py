"""Points on trajectories: Exact's and Reuse's come from the same distribution."""

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from tests.tiny import FAMILIES
from unlearning.errors import UserError
from unlearning.models.guidance import Walk
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.guidance import begin
from unlearning.sampling.sampler import as_published, denoise, skim, timesteps_of
from unlearning.sampling.trajectories import Exact, Reuse


@pytest.fixture(scope="module")
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


def walk(model, c, scale: float = 3.0) -> Walk:
    return begin(model, c, scale)


def test_a_trajectory_starts_at_its_noise_and_ends_at_the_image(model):
    c, noise = model.encode_prompts(["a cat"]), model.noise([0])
    points = list(denoise(model, noise, walk(model, c), steps=5))
    assert len(points) == 6
    torch.testing.assert_close(points[0][1], noise)
    times = [int(t) for t, _ in points]
    assert times == sorted(times, reverse=True) and times[-1] == 0


@pytest.mark.parametrize(
    ("own", "solver"),
    [
        (FlowMatchEulerDiscreteScheduler, DDIMScheduler),
        (EDMEulerScheduler, DDIMScheduler),
        (DDIMScheduler, FlowMatchEulerDiscreteScheduler),
    ],
)
def test_a_scheduler_for_another_kind_of_noise_schedule_is_refused(model, monkeypatch, own, solver):
    monkeypatch.setattr(model, "scheduler", own())
    with pytest.raises(UserError, match=own.__name__):
        next(denoise(model, model.noise([0]), walk(model, model.encode_prompts(["a cat"])), steps=2, scheduler=solver))


def test_more_steps_than_the_schedule_has_are_refused(sd1):
    """With steps_offset=1, as Stable Diffusion has it, a thousand steps of DDIM would begin at timestep 1000."""
    model = StableDiffusion.load(str(sd1), device="cpu")
    for steps, offset in ((999, 1), (1000, 0)):
        model.scheduler.register_to_config(steps_offset=offset, timestep_spacing="leading")
        assert timesteps_of(model, DDIMScheduler, steps).timesteps.max() == 999
    model.scheduler.register_to_config(steps_offset=1)
    with pytest.raises(UserError, match="1000 steps"):
        timesteps_of(model, DDIMScheduler, 1000)


@pytest.mark.parametrize("any_pipeline", ["sd2", "sana", "sd3", "dit"], indirect=True)
def test_skimming_every_timestep_is_denoising(any_pipeline):
    family, folder = any_pipeline
    model = FAMILIES[family].load(str(folder), device="cpu")
    model.scheduler.register_to_config(solver_order=1)  # DPM-Solver is then DDIM, and looks back at no other step
    if model.prediction_type == "flow":
        model.solver = FlowMatchEulerDiscreteScheduler  # nor does it round its timesteps, as DPM-Solver does
    c, noise = model.encode_prompts(["a cat", "a dog"]), model.noise([0, 1])
    plain, skimmed = (
        denoise(model, noise, walk(model, c), steps=4),
        skim(model, noise, walk(model, c), steps=4, every=1),
    )
    for (t, x), (s, y) in zip(plain, skimmed, strict=True):
        assert t == s
        # DDIM's last step goes to the schedule's first alpha, which is not quite one.
        torch.testing.assert_close(x, y, atol=1e-4 if t else 0.1, rtol=1e-3 if t else 0.1)


def test_skimming_needs_fewer_predictions_and_ends_near_the_full_trajectory(model):
    c, noise, calls = model.encode_prompts(["a cat"]), model.noise([0]), []
    *_, (_, whole) = denoise(model, noise, walk(model, c), steps=20)
    hook = model.denoiser.register_forward_pre_hook(lambda *_: calls.append(1))
    points = list(skim(model, noise, walk(model, c), steps=20, every=5))
    hook.remove()
    assert len(points) == 21 and len(calls) == 4
    assert (points[-1][1] - whole).norm() < 0.1 * whole.norm()


def test_points_lie_on_the_models_own_trajectory(model):
    torch.manual_seed(0)
    x_t, t, *_ = Exact(steps=5)(model, ["a cat"])
    torch.manual_seed(0)
    noise = torch.randn(1, *model.latent_shape)
    path = {int(s): x for s, x in denoise(model, noise, walk(model, model.encode_prompts(["a cat"])), steps=5)}
    torch.testing.assert_close(x_t, path[int(t)])


def test_the_papers_schedule_drops_the_first_timestep(model):
    c, noise = model.encode_prompts(["a cat"]), model.noise([0])
    path = list(denoise(model, noise, walk(model, c, 1.0), steps=50, schedule="paper"))
    assert [int(t) for t, _ in path[:10]] == list(range(961, 780, -20)) and int(path[10][0]) == 761
    assert len(path) == 50, "49 steps, and the picture"
    with pytest.raises(UserError, match="diffusers, paper"):
        next(denoise(model, noise, walk(model, c, 1.0), steps=50, schedule="ddpm"))


@pytest.mark.parametrize(("i", "done", "asked"), [(49, 1, 980), (40, 10, 800), (1, 49, 20), (0, 49, 0)])
def test_trajectories_end_at_the_timesteps_of_the_published_scripts(i, done, asked):
    assert as_published(i, 50) == (done, range(asked, asked + 20))


@pytest.mark.parametrize("source", [Exact, Reuse])
def test_the_papers_schedule_predicts_at_a_noisier_timestep(model, source):
    torch.manual_seed(0)
    places = source(steps=4, schedule="paper")
    times = torch.cat([places(model, ["a cat"])[1] for _ in range(24)])
    assert times.min() < 250 and times.max() > 750 and len(times.unique()) > 12


def test_every_point_of_a_pool_is_used_once_and_every_step_as_often(model):
    source, times = Reuse(steps=6), []
    for _ in range(6):
        x_t, t, c = source(model, ["a cat", "a dog"] * 2)
        assert x_t.shape == (4, *model.latent_shape) and len(t) == 4
        torch.testing.assert_close(c.embeds, model.encode_prompts(c.prompts).embeds)
        times += t.tolist()
    assert len(set(times)) == 6 and all(times.count(t) == 4 for t in times)


def test_reuse_needs_a_tenth_of_the_denoiser_calls(model):
    evaluations = []
    hook = model.denoiser.register_forward_pre_hook(lambda module, args: evaluations.append(len(args[0])))
    try:
        exact, reuse = Exact(steps=20), Reuse(steps=20)
        counts = []
        for source, calls, points in ((exact, 8, 1), (reuse, 20, 4)):
            evaluations.clear()
            for _ in range(calls):
                source(model, ["a cat"] * points)
            counts.append(sum(evaluations) / (calls * points))
    finally:
        hook.remove()
    assert counts[1] <= counts[0] / 10

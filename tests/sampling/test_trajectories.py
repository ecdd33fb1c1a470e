"""Points on trajectories: Exact's and Reuse's come from the same distribution."""

import pytest
import torch

from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.sampler import denoise
from unlearning.sampling.trajectories import Exact, Reuse


@pytest.fixture(scope="module")
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


def test_a_trajectory_starts_at_its_noise_and_ends_at_the_picture(model):
    c, noise = model.encode_prompts(["a cat"]), model.noise([0])
    points = list(denoise(model, noise, c, steps=5, guidance_scale=3.0))
    assert len(points) == 6
    torch.testing.assert_close(points[0][1], noise)
    times = [int(t) for t, _ in points]
    assert times == sorted(times, reverse=True) and times[-1] == 0


def test_points_lie_on_the_models_own_trajectory(model):
    torch.manual_seed(0)
    x_t, t, _ = Exact(steps=5)(model, ["a cat"])
    torch.manual_seed(0)
    noise = torch.randn(1, *model.latent_shape)
    path = {int(s): x for s, x in denoise(model, noise, model.encode_prompts(["a cat"]), steps=5, guidance_scale=3.0)}
    torch.testing.assert_close(x_t, path[int(t)])


def test_every_point_of_a_pool_is_used_once_and_every_step_as_often(model):
    source, times = Reuse(steps=6), []
    for _ in range(6):
        x_t, t, c = source(model, ["a cat", "a dog"] * 2)
        assert x_t.shape == (4, *model.latent_shape) and len(c) == len(t) == 4
        times += t.tolist()
    assert len(set(times)) == 6 and all(times.count(t) == 4 for t in times)


def test_reuse_asks_the_denoiser_a_tenth_as_often(model):
    evaluations = []
    hook = model.denoiser.register_forward_pre_hook(lambda module, args: evaluations.append(len(args[0])))
    try:
        exact, reuse = Exact(steps=50), Reuse(steps=50)
        counts = []
        for source, calls, points in ((exact, 20, 1), (reuse, 10, 10)):
            evaluations.clear()
            for _ in range(calls):
                source(model, ["a cat"] * points)
            counts.append(sum(evaluations) / (calls * points))
    finally:
        hook.remove()
    assert counts[1] <= counts[0] / 10

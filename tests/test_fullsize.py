"""The table of experiments/fullsize: memory counts are correct, and extrapolated values grow linearly."""

import gc

import pytest
import torch

from experiments.fullsize import memory
from experiments.fullsize.__main__ import extrapolated, table
from experiments.fullsize.memory import Alive, Counted, size
from experiments.fullsize.steps import PUBLISHED, steps
from tests import tiny
from unlearning.models.stable_diffusion import StableDiffusion


@pytest.fixture
def model():
    pipe = tiny.pipeline("sd1")
    return StableDiffusion(pipe, name="tiny", fingerprint="", device=torch.device("cpu"))


def trained(model) -> int:
    return size([p for name, p in model.denoiser.named_parameters() if "attn2" in name])


def test_storages_count_once_while_they_are_alive():
    outside = torch.zeros(1000)
    with Alive() as alive:
        alive.leave_out([outside])
        a = torch.ones(1000)
        views = [a[:10], a.view(10, 100), outside[:5]]
        assert alive.bytes == 4000
        b = a * 2
        assert alive.bytes == alive.peak == 8000
        del a, views
        gc.collect()
        assert alive.bytes == 4000
        b += 1
    assert alive.peak == 8000


def test_a_backward_pass_counts_what_it_keeps():
    x = torch.ones(1000, requires_grad=True)
    with Alive() as alive:
        y = (x.exp() * x).sum()
        assert alive.bytes >= 4000
        y.backward()
        assert x.grad is not None and alive.bytes >= 4000 and alive.peak >= 8000


def test_a_fit_holds_the_trained_weights_twice_and_the_published_loop_the_denoiser(model):
    own = size([t for part in model.parts.values() for t in (*part.parameters(), *part.buffers())])
    ours = steps(StableDiffusion)["method/esd_x"](model)
    theirs = PUBLISHED["method/esd_x"](model)
    assert ours.gradients == theirs.gradients == trained(model)
    assert 2 * trained(model) <= ours.optimizer <= 2.1 * trained(model)
    assert own + trained(model) <= ours.kept < own + size(model.denoiser.parameters()) <= theirs.kept
    assert ours.passing > 0 and ours.peak < theirs.peak


@pytest.mark.parametrize("name", ["image", "method/uce", "attack/unlearndiffatk", "published/method/rece"])
def test_methods_without_trained_weights_count_no_gradients(model, name):
    made = steps(StableDiffusion)[name](model)
    assert made.gradients < trained(model) and made.passing > 0 and made.seconds > 0
    assert not any(p.requires_grad for p in model.named_parameters().values())


def test_every_step_is_named_once_and_methods_of_other_families_are_not():
    named = steps(StableDiffusion)
    assert {"method/sld", "attack/cce", "published/attack/cce"} <= named.keys()
    assert not {"method/lcr", "method/eraseanything", "method/none"} & named.keys()


def test_blocks_are_extrapolated_by_what_one_more_of_a_kind_adds():
    def step(a: int, b: int) -> Counted:
        return Counted(1.0, 100 + 10 * a + 3 * b, 5 * a, 0, 7)

    whole = extrapolated(step, {"a": 19, "b": 38})
    assert (whole["kept"], whole["gradients"], whole["passing"]) == (100 + 190 + 114, 95, 7)


def test_the_table_sets_the_published_loop_beside_ours():
    row = {"seconds": 1.0, "kept": 2**30, "gradients": 0, "optimizer": 0, "passing": 2**30}
    text = table({"SD1.4/method/uce": row, "SD1.4/published/method/uce": row | {"passing": 3 * 2**30}})
    assert "| 0.50 |" in text and "published/" not in text


def test_an_optimizer_that_steps_outside_is_not_counted():
    weight = torch.nn.Parameter(torch.ones(10))
    counted = memory.counted([], lambda: lambda: None)
    weight.grad = torch.ones(10)
    torch.optim.Adam([weight]).step()
    assert counted.peak == 0

"""The oracle: replaces the weights by those of a model trained without the concept."""

import pytest
import torch

from tests import tiny
from unlearning.concepts import Concept, UnlearningTask
from unlearning.errors import UserError
from unlearning.methods.oracle import Oracle
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.sampler import Sampler

TASK = UnlearningTask((Concept("cat"),))


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    torch.manual_seed(7)
    tiny.sd1().save_pretrained(folder := tmp_path_factory.mktemp("other"))
    return folder


@pytest.fixture(scope="module")
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


def test_the_model_generates_the_oracles_images(model, other):
    draw, never = Sampler(steps=2), StableDiffusion.load(str(other), device="cpu")
    assert not torch.equal(draw(model, ["a q"], [0]), draw(never, ["a q"], [0]))
    with Oracle(path=str(other)).fit(model, TASK).applied_to(model):
        assert torch.equal(draw(model, ["a q"], [0]), draw(never, ["a q"], [0]))


def test_a_model_that_was_trained_on_everything_changes_nothing(model, sd1):
    assert Oracle(path=str(sd1)).fit(model, TASK).empty


def test_a_missing_oracle_gives_the_training_commands(model, tmp_path):
    with pytest.raises(UserError, match=r"train_unet\.py --without 'cat'"):
        Oracle(path=str(tmp_path / "nowhere")).fit(model, TASK)


def test_another_architecture_is_refused(model, tmp_path):
    pipeline = tiny.sd1()
    pipeline.unet = tiny.denoiser(tiny.WIDTH, act_fn="gelu", conv_in_kernel=1)
    pipeline.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="architecture"):
        Oracle(path=str(tmp_path / "other")).fit(model, TASK)

"""What every method owes, whatever its kind: one test a promise, one case a file in conf/method."""

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from tests.composed import config
from unlearning.__main__ import CONF
from unlearning.erasure import Erasure
from unlearning.sampling.sampler import Sampler

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
SHORT = {"method.iterations": 2, "method.steps": 3}
# Random weights tell no concept from another, and know no words.
SHORT |= {"method.fingerprint.purity": 0.0, "method.conditioning": "generic", "method.batch_size": 2}


@pytest.fixture(scope="module", params=METHODS)
def fitted(request, sd1, tmp_path_factory):
    """(method's name, model, its pictures before, erasure, weights before)."""
    cfg = config(tmp_path_factory.mktemp("run"), f"method={request.param}", f"model.path={sd1}", "concept=cat")
    for key, value in SHORT.items():
        if OmegaConf.select(cfg, key) is not None:
            OmegaConf.update(cfg, key, value)
    torch.manual_seed(0)
    model, task = instantiate(cfg.model), instantiate(cfg.dataset)
    needs = {"trainer": instantiate(cfg.trainer)} if OmegaConf.is_missing(cfg.method, "trainer") else {}
    weights = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    before = pictures(model)
    return request.param, model, before, instantiate(cfg.method, **needs).fit(model, task), weights


def pictures(model) -> torch.Tensor:
    return Sampler(steps=2)(model, ["a photo of the cat", "a photo of the dog"], [1, 2])


def test_fitting_leaves_the_model_bit_identical(fitted):
    _, model, before, _, weights = fitted
    assert all(torch.equal(v, weights[k]) for k, v in model.denoiser.state_dict().items())
    assert not any(p.requires_grad for p in model.denoiser.parameters())
    assert torch.equal(pictures(model), before)


def test_an_erasure_changes_the_pictures_while_it_is_applied_and_no_longer(fitted):
    name, model, before, erasure, weights = fitted
    with erasure.applied_to(model):
        after = pictures(model)
    assert torch.equal(after, before) == (name == "none")
    assert torch.equal(pictures(model), before)
    assert all(torch.equal(v, weights[k]) for k, v in model.denoiser.state_dict().items())


def test_an_erasure_is_undone_when_something_fails_inside(fitted):
    _, model, before, erasure, _ = fitted
    with pytest.raises(RuntimeError, match="inside"), erasure.applied_to(model):
        raise RuntimeError("inside")
    assert torch.equal(pictures(model), before)


def test_a_saved_erasure_comes_back_the_same(fitted, tmp_path):
    _, model, _, erasure, _ = fitted
    erasure.save(tmp_path, base=model)
    again = Erasure.load(tmp_path)
    assert type(again) is type(erasure)
    assert again.fingerprint == erasure.fingerprint
    assert Erasure.base_of(tmp_path) == model.fingerprint
    with erasure.applied_to(model):
        once = pictures(model)
    with again.applied_to(model):
        assert torch.equal(pictures(model), once)
    assert {p.suffix for p in tmp_path.iterdir()} <= {".json", ".safetensors", ".md"}
    assert model.name in (tmp_path / "README.md").read_text()

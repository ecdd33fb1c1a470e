"""What every method owes, whatever its kind: one test a promise, one case a file in conf/method."""

import pytest
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf

from tests.composed import config
from tests.tiny import shrunk
from unlearning.__main__ import CONF
from unlearning.erasures.base import Erasure
from unlearning.models.diffusion import DiffusionModel

METHODS = sorted(path.stem for path in (CONF / "method").glob("*.yaml"))
SHORT = {"method.iterations": 2, "method.steps": 3}
SHORT |= {"dataset.pictures": 12, "dataset.images": 2, "method.selection.top": 4, "method.selection.min_freq": 1}
NO_PROMPTS = "emoji_vqgan"  # the model of methods that work on no diffusion model
SEES_NOTHING = "lcr_nudity"  # in a drawing of a cat
# Random weights tell no concept from another, and know no words.
SHORT |= {"method.fingerprint.purity": 0.0, "method.conditioning": "generic", "method.batch_size": 2}


@pytest.fixture(scope="module", params=METHODS)
def fitted(request, sd1, vqgan, tmp_path_factory):
    """(method's name, model, a function that makes its pictures, those before, erasure, weights before)."""
    folder = tmp_path_factory.mktemp("run")
    chosen = [f"method={request.param}", f"model.path={sd1}", "concept=cat", "sampler.steps=2"]
    if not issubclass(DiffusionModel, get_class(config(folder, *chosen).method._target_).works_on):
        chosen[1:] = [f"model={NO_PROMPTS}", f"model.path={vqgan}", "concept=cat"]
    cfg = config(folder, *chosen)
    for key, value in SHORT.items():
        if OmegaConf.select(cfg, key) is not None:
            OmegaConf.update(cfg, key, value)
    torch.manual_seed(0)
    model, task = instantiate(cfg.model), instantiate(cfg.dataset)
    task = shrunk(task, model) if isinstance(model, DiffusionModel) else task
    needs = {"trainer": instantiate(cfg.trainer)} if OmegaConf.is_missing(cfg.method, "trainer") else {}
    weights = {k: v.clone() for k, v in model.network.state_dict().items()}
    sampler = instantiate(cfg.sampler)
    rows = sampler.manifest(folder / "images", task, 0)[:2]

    def pictures() -> torch.Tensor:
        return sampler.draw(model, rows)[0]

    before = pictures()
    return request.param, model, pictures, before, instantiate(cfg.method, **needs).fit(model, task), weights


def test_fitting_leaves_the_model_bit_identical(fitted):
    _, model, pictures, before, _, weights = fitted
    assert all(torch.equal(v, weights[k]) for k, v in model.network.state_dict().items())
    assert not any(p.requires_grad for p in model.network.parameters())
    assert torch.equal(pictures(), before)


def test_an_erasure_changes_the_pictures_while_it_is_applied_and_no_longer(fitted):
    name, model, pictures, before, erasure, weights = fitted
    with erasure.applied_to(model):
        after = pictures()
    assert torch.equal(after, before) == (name in ("none", SEES_NOTHING))
    assert torch.equal(pictures(), before)
    assert all(torch.equal(v, weights[k]) for k, v in model.network.state_dict().items())


def test_an_erasure_is_undone_when_something_fails_inside(fitted):
    _, model, pictures, before, erasure, _ = fitted
    with pytest.raises(RuntimeError, match="inside"), erasure.applied_to(model):
        raise RuntimeError("inside")
    assert torch.equal(pictures(), before)


def test_a_saved_erasure_comes_back_the_same(fitted, tmp_path):
    _, model, pictures, _, erasure, _ = fitted
    erasure.save(tmp_path, base=model)
    again = Erasure.load(tmp_path)
    assert type(again) is type(erasure)
    assert again.digest == erasure.digest
    assert Erasure.base_of(tmp_path) == model.fingerprint
    with erasure.applied_to(model):
        once = pictures()
    with again.applied_to(model):
        assert torch.equal(pictures(), once)
    assert {p.suffix for p in tmp_path.iterdir()} <= {".json", ".safetensors", ".md"}
    assert model.name in (tmp_path / "README.md").read_text()

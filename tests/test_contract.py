"""The contract of every method and attack: one test for each promise, one case for each file in conf/."""

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import get_args

import pytest
import pytorch_lightning as pl
import torch
from hydra.utils import get_class, instantiate
from omegaconf import DictConfig, OmegaConf
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.composed import ATTACKS, config, shortened
from tests.tiny import shrunk
from unlearning.__main__ import CONF
from unlearning.attacks.base import Access
from unlearning.concepts import ATTACK, ERASE, Concept
from unlearning.config import instances
from unlearning.config.suggestions import choices
from unlearning.erasures.base import Erasure
from unlearning.erasures.weight_patch import WeightPatch
from unlearning.errors import UserError
from unlearning.methods.base import TrainedMethod
from unlearning.models.base import Model
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.joint_attention import JointAttention
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.attack_result import AttackResult
from unlearning.sampling.attack_result import attacked as attacked_rows

METHODS = choices(CONF, "method")
# The other files are variants of these: they inherit the class.
CLASSES = [name for name in METHODS if "_target_" in OmegaConf.load(CONF / "method" / f"{name}.yaml")]
CLASSES += ["hirm_s", "lcr_localized", "scrubber_seed"]  # other paths where a concept has no anchor
FEW = 2  # steps, iterations, ... of a method or an attack
SIZES = {"dataset.pictures": 12, "dataset.images": 2, "method.detector.stride": 16}
NOTHING_TO_SEE = "lcr_nudity"  # its detector finds nothing in a drawing of a cat


@cache
def loaded(yaml: str) -> Model:
    return instantiate(OmegaConf.create(yaml))


def copied(model: Model) -> Model:
    """A model with weights of its own, and the same tokenizers: those of a deep copy lack their word boundaries."""
    parts = model.pipeline.components if isinstance(model, DiffusionModel) else {}
    return copy.deepcopy(model, {id(part): part for name, part in parts.items() if "tokenizer" in name})


@cache
def task_for(model: Model, yaml: str) -> object:
    task = instantiate(OmegaConf.create(yaml))
    return shrunk(task, model) if isinstance(model, DiffusionModel) else task


def built(folder, *chosen: str) -> tuple[DictConfig, Model, object, object]:
    """(config, model, task, sampler) of a short run. The model is a copy of its own."""
    cfg = config(folder, *chosen)
    for group in ("method", "attack"):
        shortened(cfg[group], FEW)
    for key, value in SIZES.items():
        if OmegaConf.select(cfg, key) is not None:
            OmegaConf.update(cfg, key, value)
    torch.manual_seed(0)
    model, dataset = (OmegaConf.to_yaml(cfg[group], resolve=True) for group in ("model", "dataset"))
    return cfg, copied(loaded(model)), task_for(loaded(model), dataset), instantiate(cfg.sampler)


def erased_elsewhere(pipeline: Path, folder: Path) -> Path:
    """A file with new weights of the UNet, as other code saves them."""
    weights = load_file(pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    save_file({n: 1.1 * v for n, v in weights.items() if "attn2" in n}, folder / "erased.safetensors")
    return folder / "erased.safetensors"


def weights_of(model: Model) -> dict[str, torch.Tensor]:
    """Every weight and buffer of every part."""
    return {f"{part}.{k}": v.clone() for part, module in model.parts.items() for k, v in module.state_dict().items()}


def unchanged(model: Model, weights: dict[str, torch.Tensor]) -> bool:
    now = weights_of(model)
    same = now.keys() == weights.keys() and all(torch.equal(v, weights[k]) for k, v in now.items())
    return same and not any(p.requires_grad or p.grad is not None for p in model.named_parameters().values())


@pytest.fixture(scope="module")
def accelerator():
    """What a Trainer does after a fit on an accelerator: it moves what it trained to another device."""
    cpu = pl.LightningModule.cpu
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl.LightningModule, "cpu", lambda m: m.to("meta") if isinstance(m, TrainedMethod) else cpu(m))
        yield


@pytest.fixture(scope="module", params=METHODS)
def fitted(request, sd1, sd3, vqgan, tmp_path_factory, accelerator):
    """(method's name, model, task, a function that generates its images, those before, method, erasure, weights)."""
    folder = tmp_path_factory.mktemp("run")
    chosen = [f"method={request.param}", f"model.path={sd1}", "concept=cat", "sampler.steps=2"]
    works_on = get_class(config(folder, *chosen).method._target_).works_on
    if issubclass(works_on, JointAttention):
        chosen[1:2] = ["model=emoji_sd3", f"model.path={sd3}"]
    elif not issubclass(StableDiffusion, works_on):
        chosen[1:] = ["model=emoji_vqgan", f"model.path={vqgan}", "concept=cat"]
    if request.param == "weights":
        chosen.append(f"method.path={erased_elsewhere(sd1, folder)}")
    if request.param == "oracle":
        torch.manual_seed(7)
        tiny.sd1().save_pretrained(folder / "never")
        chosen.append(f"method.path={folder}/never")
    cfg, model, task, sampler = built(folder, *chosen)
    trainer = instantiate(cfg.trainer)
    method = instantiate(cfg.method, **instances.trainers(OmegaConf.to_container(cfg.method), trainer))
    weights = weights_of(model)
    rows = sampler.manifest(folder / "images", task, 0)[:1]

    def images() -> torch.Tensor:
        return sampler.draw(model, rows)[0]

    before = images()
    return request.param, model, task, images, before, method, method.fit(model, task), weights


def test_an_erasure_changes_the_images_while_it_is_applied_and_a_fit_changes_nothing(fitted):
    name, model, _, images, before, method, erasure, weights = fitted
    assert unchanged(model, weights)
    assert torch.equal(images(), before)
    with erasure.applied_to(model):
        after = images()
    assert torch.equal(after, before) == (name in ("none", NOTHING_TO_SEE))
    assert torch.equal(images(), before)
    assert unchanged(model, weights)
    assert method.writable == erasure.writable, "the method declares whether its erasure fits into weights"


def test_a_saved_erasure_comes_back_the_same_and_is_undone_when_something_fails_inside(fitted, tmp_path):
    _, model, _, images, before, _, erasure, weights = fitted
    erasure.save(tmp_path, base=model)
    again = Erasure.load(tmp_path)
    assert type(again) is type(erasure)
    assert again.digest == erasure.digest
    assert Erasure.base_of(tmp_path) == model.fingerprint
    assert {p.suffix for p in tmp_path.iterdir()} <= {".json", ".safetensors", ".md"}
    assert Path(model.name).name in (tmp_path / "README.md").read_text()
    with erasure.applied_to(model):
        once = images()
    with pytest.raises(RuntimeError, match="inside"), again.applied_to(model):
        assert torch.equal(images(), once)
        raise RuntimeError("inside")
    assert torch.equal(images(), before)
    assert unchanged(model, weights)


@pytest.mark.parametrize("fitted", CLASSES, indirect=True)
def test_a_bare_concept_is_erased_on_top_of_another_erasure_or_refused(fitted):
    """A task without anchor, synonyms and retained concepts. Afterwards the model still has the earlier erasure."""
    _, model, task, images, _, method, _, weights = fitted
    bare = replace(task, erase=tuple(Concept(c.name) for c in task.erase), retain=())
    weight, value = next((n, v) for n, v in model.named_parameters().items() if n.startswith(model.component))
    with WeightPatch({weight: 1.01 * value.detach()}).applied_to(model):
        patched, before = weights_of(model), images()
        try:
            assert isinstance(method.fit(model, bare), Erasure)
        except UserError as error:
            assert "anchor" in str(error) or "retain" in str(error), "it says what the concept lacks"
        assert unchanged(model, patched) and torch.equal(images(), before)
    assert unchanged(model, weights)


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_covers_every_image_and_leaves_the_model_bit_identical(name, sd1, tmp_path):
    chosen = [f"attack=[{','.join(ATTACKS)}]", f"model.path={sd1}", "concept=cat", "sampler.steps=2", "method=none"]
    cfg, model, task, sampler = built(tmp_path, *chosen)
    attack, weights = instantiate(cfg.attack[name]), weights_of(model)
    erasure = WeightPatch({f"{layer}.weight": 2 * m.weight for layer, m in model.text_projections()})
    rows = [row for row in sampler.manifest(tmp_path / "images", task, 0) if row.role == ERASE]
    observed = attack.observe(model, task, rows)
    assert unchanged(model, weights)
    with erasure.applied_to(model):
        before, erased = sampler.draw(model, rows[:1])[0], weights_of(model)
        found = observed if isinstance(observed, AttackResult) else attack.find(model, task, rows, observed)
        assert unchanged(model, erased)
        assert {one.target for one in found.prompts} <= {row.prompt for row in rows}
        found.save(tmp_path / "kept")
        attacked = attacked_rows(tmp_path / "kept", rows)
        assert {row.role for row in attacked} == {ATTACK} and len(attacked) == len(rows)
        drawn = attack.sampler(sampler).draw(model, attacked[:1])[0]
    assert drawn.isfinite().all() and not torch.equal(drawn, before), "it starts from what the attack found"
    assert unchanged(model, weights)
    assert attack.access in get_args(Access)

"""ESD on flow models with joint attention: its target is frozen, and training approaches it."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from omegaconf import OmegaConf

from tests import tiny
from unlearning.__main__ import CONF
from unlearning.concepts import Concept, UnlearningTask
from unlearning.methods.esd import ESD
from unlearning.sampling.guidance import classifier_free
from unlearning.training.student import LoRA, Weights

TASK = UnlearningTask(erase=(Concept("cat"),))
TEXT = {f"add_{name}_proj" for name in "qkv"} | {"to_add_out"}


@pytest.fixture(params=["sd3", "flux"], scope="module")
def model(request, tmp_path_factory):
    folder = tiny.save(request.param, tmp_path_factory.mktemp("models"))
    return tiny.FAMILIES[request.param].load(str(folder), device="cpu")


def esd(student, **settings) -> ESD:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return ESD(
        steps=3, student=student, optimizer=partial(torch.optim.Adam, lr=1e-2),
        trainer=partial(pl.Trainer, enable_model_summary=False, **quiet), **{"iterations": 2, **settings},
    )  # fmt: skip


def written(name: str) -> str:
    """The weights that the method's file trains."""
    return str(OmegaConf.load(CONF / "method" / f"{name}.yaml").student.parameters)


def test_esd_x_moves_the_texts_part_of_joint_attention_and_esd_u_the_rest(model):
    moved = {name: esd(Weights(written(name))).fit(model, TASK).weights for name in ("esd_x", "esd_u")}
    of_text = {n for n in model.named_parameters() if TEXT & set(n.split(".")) and n.startswith("transformer.")}
    assert moved["esd_x"].keys() == {n for n in of_text if ".add_" in n}
    assert moved["esd_u"] and not moved["esd_u"].keys() & moved["esd_x"].keys()
    own = model.named_parameters()
    assert all(any(not torch.equal(v, own[n]) for n, v in weights.items()) for weights in moved.values())


@pytest.mark.parametrize("student", [Weights(r"\.add_"), LoRA(r"transformer.*attn", rank=2)])
def test_the_target_of_the_flow_is_frozen_and_training_approaches_it(model, student):
    c, null = (model.encode_prompts([TASK.prompt(word)]) for word in ("cat", ""))
    x, t = torch.randn(1, *model.latent_shape), torch.tensor([500.0])
    target = classifier_free(model, x, t, c, null, -1.0)
    before = (model.predict(x, t, c) - target).pow(2).mean()
    method, targets = esd(student, iterations=12), []

    class Watched(ESD):
        def erasing(self, *point):
            with torch.no_grad():
                targets.append(classifier_free(self.teacher, x, t, c, null, -1.0))
            return super().erasing(*point)

    method.__class__ = Watched
    with method.fit(model, TASK).applied_to(model):
        assert (model.predict(x, t, c) - target).pow(2).mean() < before
    assert len(targets) == 12 and all(torch.equal(seen, target) for seen in targets)

"""Devices that are not there are named before a weight is loaded."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from unlearning.errors import UserError
from unlearning.models.base import chosen_device

ABSENT = [
    name
    for name in ("cuda", "cuda:31", "mps", "xpu")
    if not name.startswith(str(torch.accelerator.current_accelerator()))
]


@pytest.mark.parametrize("name", [*ABSENT, "foo", "meta", "cpu:x", "cuda:-1", ""])
def test_a_device_that_is_not_there_is_named(name):
    with pytest.raises(UserError) as error:
        chosen_device(name)
    assert repr(name) in str(error.value) and "cpu" in str(error.value) and len(str(error.value).splitlines()) == 1


def test_devices_that_are_there():
    assert chosen_device("cpu") == torch.device("cpu")
    assert torch.empty(1, device=chosen_device("auto")).device == chosen_device("auto")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
@pytest.mark.parametrize(
    "override",
    ["trainer.accelerator=gpu", "trainer.accelerator=foo", "trainer=ddp", "trainer.devices=0", "model.device=cuda",
     "evaluator.clip_score.device=cuda", "evaluator.clip_score.device=foo"],
)  # fmt: skip
def test_a_run_on_a_device_that_is_not_there_ends_before_a_weight_is_loaded(told, tmp_path, monkeypatch, override):
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", None)  # calling it would be an error
    chosen = ["trainer.accelerator=auto"] if override == "trainer=ddp" else []
    chosen += ["evaluator=clip_score"] if override.startswith("evaluator") else []
    message = told("dataset=prompt", override, *chosen).strip()
    setting, _, value = override.partition("=")
    assert setting.rpartition(".")[0] in message or "ddp" in message or f"There is no device {value!r} here" in message
    assert len(message.splitlines()) == 1 and not (tmp_path / "store").exists()

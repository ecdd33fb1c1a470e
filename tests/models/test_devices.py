"""Missing devices are reported before a weight is loaded."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from unlearning.errors import UserError
from unlearning.models.base import chosen_device
from unlearning.models.stable_diffusion import StableDiffusion

ABSENT = [
    name
    for name in ("cuda", "cuda:31", "mps", "xpu")
    if not name.startswith(str(torch.accelerator.current_accelerator()))
]


@pytest.mark.parametrize("name", [*ABSENT, "foo", "meta", "cpu:x", "cuda:-1", ""])
def test_a_missing_device_is_reported(name):
    with pytest.raises(UserError) as error:
        chosen_device(name)
    assert repr(name) in str(error.value) and "cpu" in str(error.value) and len(str(error.value).splitlines()) == 1


def test_available_devices_are_accepted():
    assert chosen_device("cpu") == torch.device("cpu")
    assert torch.empty(1, device=chosen_device("auto")).device == chosen_device("auto")


class StableDiffusionOfARank(StableDiffusion):
    """Says which device it would be loaded to."""

    @classmethod
    def load(cls, path, **settings):
        raise UserError(f"loaded to {chosen_device('auto')}")


@pytest.mark.parametrize(("trainer", "device"), [("trainer=ddp", "cuda:1"), ("trainer=default", "cuda:0")])
def test_a_task_of_srun_takes_its_own_device_if_it_is_a_rank_of_a_run(error_of, monkeypatch, trainer, device):
    """And the first one if it is a run of its own, as its trainer does."""
    as_task_of_srun(monkeypatch, NTASKS_PER_NODE=2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr("unlearning.run.launch", lambda trainer: None)  # it would wait for the first task
    model = f"model._target_={__name__}.StableDiffusionOfARank.load"
    devices = ["trainer.devices=2"] if trainer == "trainer=ddp" else []
    assert f"loaded to {device}" in error_of("dataset=prompt", model, trainer, *devices)


def test_tasks_that_lightning_cannot_count_are_named(error_of, monkeypatch):
    as_task_of_srun(monkeypatch)
    message = error_of("dataset=prompt", "trainer=ddp", "trainer.devices=2").strip()
    assert "trainer.devices=2" in message and "--ntasks-per-node=2" in message and len(message.splitlines()) == 1


def as_task_of_srun(monkeypatch, **more: int) -> None:
    """The second of two tasks on one machine."""
    own = {"NTASKS": 2, "NNODES": 1, "NODEID": 0, "JOB_ID": 7, "PROCID": 1, "LOCALID": 1, "JOB_NAME": "a job", **more}
    for name, value in own.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setenv("LOCAL_RANK", "")
    monkeypatch.delenv("LOCAL_RANK")  # and what the run sets is undone


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine has an accelerator")
@pytest.mark.parametrize(
    "override",
    ["trainer.accelerator=gpu", "trainer.accelerator=foo", "trainer=ddp", "trainer.devices=0", "model.device=cuda",
     "evaluator.clip_score.device=cuda", "evaluator.clip_score.device=foo"],
)  # fmt: skip
def test_a_run_on_a_device_that_is_not_there_ends_before_a_weight_is_loaded(error_of, tmp_path, monkeypatch, override):
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", None)  # calling it would be an error
    chosen = ["trainer.accelerator=auto"] if override == "trainer=ddp" else []
    chosen += ["evaluator=clip_score"] if override.startswith("evaluator") else []
    message = error_of("dataset=prompt", override, *chosen).strip()
    setting, _, value = override.partition("=")
    assert setting.rpartition(".")[0] in message or "ddp" in message or f"There is no device {value!r} here" in message
    assert len(message.splitlines()) == 1 and not (tmp_path / "store").exists()

"""bfloat16 where the hardware is fast in it, float32 elsewhere."""

import copy
import logging
from functools import cache

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from unlearning.__main__ import CONF
from unlearning.config import precision
from unlearning.config.naming import config_hash
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.models.vqgan import VQGAN


@pytest.fixture
def machine(monkeypatch):
    """machine(fast): no accelerator, and a processor that is fast in bfloat16 or not."""

    def have(fast: bool) -> None:
        monkeypatch.setattr(precision, "_has_accelerator", lambda: False)
        monkeypatch.setattr(precision, "_fast_processor", lambda: fast)

    return have


@cache
def _composed(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", list(overrides))


def composed(*overrides):
    return copy.deepcopy(_composed(*overrides))


@pytest.mark.parametrize(("fast", "expected"), [(True, "bfloat16"), (False, None)])
def test_auto_is_the_default_and_selects_the_fast_precision_of_the_processor(machine, fast, expected):
    machine(fast)
    assert composed("model=sd14").model.autocast == "auto"
    assert composed("model=emoji_vqgan").model.autocast is None, "half precision changes codes"
    for overrides, used in (([], expected), (["model.dtype=float16"], None), (["model.autocast=null"], None)):
        precision.settle(config := composed("model=sd14", *overrides), "cpu")
        assert config.model.autocast == used
    assert precision.chosen_autocast("auto", "float32", "cpu") == expected
    assert precision.chosen_autocast("float16", "float32", "cpu") == "float16"


def test_a_run_records_what_was_used(machine, unlearn):
    machine(True)
    run = unlearn("dataset=prompt", "model.autocast=auto", "model.device=cpu", "stages=[fit]")
    assert OmegaConf.load(run / ".hydra" / "resolved.yaml").model.autocast == "bfloat16"


def test_a_model_is_loaded_with_auto(machine, sd1, vqgan):
    machine(True)
    for load, folder in ((StableDiffusion.load, sd1), (VQGAN.load, vqgan)):
        assert load(str(folder), device="cpu", autocast="auto").autocast == torch.bfloat16


def test_the_name_of_a_run_says_what_was_used(machine):
    machine(True)
    default, chosen, other = (
        config_hash(composed(*o))
        for o in (["model.autocast=auto"], ["model.autocast=bfloat16"], ["model.autocast=null"])
    )
    machine(False)
    assert default == chosen != other == config_hash(composed())


def test_slow_bfloat16_gives_a_warning_with_the_factor(machine, monkeypatch, caplog):
    machine(False)
    monkeypatch.setattr(precision, "_slowdown", lambda: 15.2)
    with caplog.at_level(logging.WARNING):
        precision.warn_if_slow("bfloat16", "cpu")
        assert "15 times slower" in caplog.text and "model.autocast=auto" in caplog.text
        caplog.clear()
        precision.warn_if_slow(None, "cpu")
        precision.warn_if_slow("bfloat16", "cuda")
        machine(True)
        precision.warn_if_slow("bfloat16", "cpu")
    assert not caplog.text


def test_the_slowdown_is_a_ratio_of_times():
    assert 0 < precision._slowdown() < 1e4


@pytest.mark.skipif(torch.cuda.is_available(), reason="asks about a machine without a GPU")
def test_the_precision_of_other_devices_is_not_guessed(monkeypatch):
    monkeypatch.setattr(precision, "_has_accelerator", lambda: True)
    monkeypatch.setattr(precision, "_fast_processor", lambda: True)
    assert precision.fast_autocast("float32", "mps") is None

"""Sweeps of W&B agents use overrides that Hydra can parse."""

import itertools

import pytest
import yaml
from hydra import compose, initialize_config_dir

from unlearning.__main__ import CONF
from unlearning.evaluators.accuracy import Accuracy

SWEEP = yaml.safe_load((CONF.parent / "experiments/sweeps/wandb.yaml").read_text())


def values(parameter: dict) -> list:
    """All that a parameter may be, or its ends."""
    return parameter.get("values") or [parameter[key] for key in ("value", "min", "max") if key in parameter]


def test_every_parameter_is_an_override_that_composes():
    swept = [[f"{name}={value}" for value in values(parameter)] for name, parameter in SWEEP["parameters"].items()]
    assert all(swept)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for overrides in itertools.zip_longest(*swept):
            config = compose("config", [o or first for o, (first, *_) in zip(overrides, swept, strict=True)])
            assert set(config.logger) == {"csv", "wandb"}
        with pytest.raises(Exception, match="etaa"):
            compose("config", ["method.etaa=1"])


def test_the_maximised_metric_is_measured():
    assert Accuracy.higher_is_better[SWEEP["metric"]["name"]] == (SWEEP["metric"]["goal"] == "maximize")


def test_the_agent_calls_the_command_line():
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    arguments = create_sweep_command_args({"args": {"method.eta": {"value": 2.0}, "concept": {"value": "cat"}}})
    assert arguments["args_no_hyphens"] == ["method.eta=2.0", "concept=cat"]
    assert SWEEP["command"] == ["${env}", "${program}", "${args_no_hyphens}"] and SWEEP["program"] == "unlearn"

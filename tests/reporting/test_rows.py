"""Settings as they are read from .hydra: quickly, and yet what OmegaConf would say."""

from contextlib import suppress

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.basecontainer import BaseContainer
from omegaconf.errors import OmegaConfBaseException

from unlearning.__main__ import CONF
from unlearning.errors import UserError
from unlearning.reporting.rows import directions, measured, rows, settings


def resolved(config: DictConfig, prefix: str = ""):
    """Every leaf by dotted name that OmegaConf can resolve."""
    for key in config:
        with suppress(OmegaConfBaseException):
            value = config[key]
            if isinstance(value, DictConfig):
                yield from resolved(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", "+".join(map(str, value)) if isinstance(value, ListConfig) else value


def left(run, config: DictConfig, choices: dict) -> None:
    """What Hydra leaves in a run's folder."""
    (run / ".hydra").mkdir(parents=True)
    OmegaConf.save(config, run / ".hydra" / "config.yaml")
    OmegaConf.save(OmegaConf.create({"hydra": {"runtime": {"choices": choices}}}), run / ".hydra" / "hydra.yaml")


@pytest.mark.parametrize("overrides", [["method=unguide"], ["method=scrubber", "model=sd14", "evaluator=nudenet"]])
def test_a_real_config_is_read_as_omegaconf_reads_it(tmp_path, monkeypatch, overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=[*overrides, "+rates=[1e-5,2.0]", "+off='no'"], return_hydra_config=True)
    choices = OmegaConf.to_container(config.hydra.runtime.choices)
    with open_dict(config):
        del config.hydra
    left(tmp_path / "run", config, choices)
    monkeypatch.setattr(BaseContainer, "_resolvers", {})  # a reader has none of the program's that was run
    expected = dict(resolved(OmegaConf.load(tmp_path / "run" / ".hydra" / "config.yaml")))
    groups = {key: value for key, value in choices.items() if not key.startswith("hydra/")}
    assert settings(tmp_path / "run") == {**expected, **groups}
    assert expected["rates"] == "1e-05+2.0" and expected["off"] == "no"
    assert groups["method"] == overrides[0].partition("=")[2]


def test_settings_that_name_others_and_what_nobody_can_resolve(tmp_path):
    config = {
        "concept": "cat",
        "part": {"steps": 5, "of": "${concept}s in ${part.steps}"},
        "copy": "${part}",
        "list": ["${concept}", 2],
        "gone": "${nothing}",
        "later": "${hydra:runtime.output_dir}",
        "missing": "???",
        "none": None,
    }
    left(tmp_path / "run", OmegaConf.create(config), {"method": "uce", "hydra/launcher": "basic"})
    assert settings(tmp_path / "run") == {
        "concept": "cat",
        "part.steps": 5,
        "part.of": "cats in 5",
        "copy.steps": 5,
        "copy.of": "cats in 5",
        "list": "cat+2",
        "none": None,
        "method": "uce",
    }


def test_what_is_no_run_is_answered_and_what_lies_in_a_run_is_none(finished, tmp_path):
    run = finished("runs/a")
    finished("runs/a/images/b")
    assert [row["run"] for row in rows(tmp_path)] == [run]
    with pytest.raises(UserError, match=r"no \.hydra/config\.yaml"):
        settings(tmp_path)


def test_a_metric_is_no_protocol_and_no_direction():
    names = [
        "cost/seconds",
        "efficacy/acc_e",
        "efficacy/acc_e/protocol",
        "efficacy/acc_e/better",
        "base/efficacy/acc_e",
    ]
    assert measured([*names, "sampler.steps"]) == ["efficacy/acc_e", "cost/seconds"]


def test_directions_are_the_runs_own_where_they_state_them():
    stated = {"efficacy/mine": 1.0, "efficacy/mine/protocol": "p", "efficacy/mine/better": "higher"}
    assert directions([stated, {"cost/seconds": 1.0}]) == {"efficacy/mine": True}, "and no evaluator is imported"
    silent = {"efficacy/acc_e": 1.0, "efficacy/acc_e/protocol": "p"}
    assert directions([stated, silent]).items() >= {"efficacy/mine": True, "efficacy/acc_e": False}.items()

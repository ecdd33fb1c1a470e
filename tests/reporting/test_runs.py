"""Finished runs as they are read from disk: settings as OmegaConf reads them, and broken runs."""

import logging

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict

from tests.reporting.conftest import METRICS
from unlearning.__main__ import CONF
from unlearning.errors import UserError
from unlearning.reporting.runs import drawings, metric_names, read_run, read_runs, read_settings


def flat(settings, prefix=""):
    for key, value in settings.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", "+".join(map(str, value)) if isinstance(value, list) else value


def left(run, config, choices) -> None:
    """Writes what a run leaves of its settings."""
    (run / ".hydra").mkdir(parents=True)
    OmegaConf.save(config, run / ".hydra" / "resolved.yaml")
    OmegaConf.save(OmegaConf.create({"hydra": {"runtime": {"choices": choices}}}), run / ".hydra" / "hydra.yaml")


def test_a_real_config_is_read_as_omegaconf_reads_it(tmp_path):
    words = ["method=scrubber", "model=sd14", "dataset=folder", "forget=of/mugs", "+rates=[1e-5,2.0]", "+off='no'"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("config", overrides=[*words, "title=t", "paths.output_dir=/t"], return_hydra_config=True)
    choices = OmegaConf.to_container(config.hydra.runtime.choices)
    with open_dict(config):
        del config.hydra
    resolved = OmegaConf.to_container(config, resolve=True)
    left(tmp_path / "run", OmegaConf.create(resolved), choices)
    found = read_settings(tmp_path / "run")
    for key, value in flat(resolved):
        assert value == "???" or str(value).startswith("/") or key in choices or found[key] == value
    assert found["rates"] == "1e-05+2.0" and found["off"] == "no" and found["concept"] == "mugs"
    assert (found["method"], found["dataset"]) == ("scrubber", "folder")


def test_paths_below_the_runs_own_folders_agree_between_machines(tmp_path):
    for name in ("here", "there"):
        config = {
            "paths": {"weights": f"/{name}/weights", "output_dir": f"/{name}/weights/run"},
            "model": {"path": f"/{name}/weights/unet"},
            "trainer": {"root": f"/{name}/weights/run/logs"},
            "dataset": {"path": "/data"},
        }
        left(tmp_path / name, OmegaConf.create(config), {})
    here, there = (
        {key: value for key, value in read_settings(tmp_path / name).items() if not key.startswith("paths.")}
        for name in ("here", "there")
    )
    assert here == there and here["dataset.path"] == "/data" and len(set(here.values())) == 3


def test_several_concepts_are_one_setting(finished):
    assert read_run(finished(concept=["cat", "dog"])).concept == "cat+dog"


def test_earlier_erasures_are_named_by_concept_and_method_for_all_seeds(finished):
    for seed in (0, 1):
        first = finished(f"first{seed}", method="uce", seed=seed)
        second = finished(f"second{seed}", concept="dog", seed=seed, config={"after": f"{first}/erasure"})
        assert read_run(second)["after"] == "cat by uce"
        third = finished(f"third{seed}", seed=seed, config={"after": [f"{second}/erasure", "/nowhere/erasure"]})
        assert read_run(third)["after"] == "cat by uce, dog by esd_x+/nowhere/erasure"


def test_runs_are_found_at_any_depth_and_none_within_another(finished, tmp_path):
    a, b = finished("runs/a"), finished("runs/deep/er/b", seed=2)
    finished("runs/a/images/c")
    (tmp_path / "runs" / "unfinished" / ".hydra").mkdir(parents=True)
    found = read_runs(tmp_path)
    assert [run.folder for run in found] == [a, b]
    expected = {"model": "emoji_unet", "method": "esd_x", "seed": 2, "sampler.steps": 50}
    assert found[1].settings.items() >= expected.items() and found[1].value("efficacy/acc_e") == 5.0


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metrics.json", ""),
        ("metrics.json", "{"),
        ("metrics.json", "[1]"),
        ("metrics.json", "{}"),
        ("metrics.json", b"\xff\xfe"),
        (".hydra/resolved.yaml", "a: [1"),
        (".hydra/resolved.yaml", ""),
        (".hydra/resolved.yaml", "paths: 3"),
        (".hydra/hydra.yaml", None),
        (".hydra/hydra.yaml", "hydra: 3"),
        (".hydra/hydra.yaml", "runtime: {choices: 3}"),
    ],
)
def test_a_broken_run_is_named_and_left_out(finished, tmp_path, caplog, file, content):
    whole, broken = finished("runs/whole"), finished("runs/broken")
    if content is None:
        (broken / file).unlink()
    else:
        (broken / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with caplog.at_level(logging.WARNING):
        assert [run.folder for run in read_runs(tmp_path)] == [whole]
    assert str(broken) in caplog.text and file.partition("/")[0] in caplog.text


def test_folders_without_runs_give_an_error(tmp_path):
    with pytest.raises(UserError, match="resolved"):
        read_settings(tmp_path)
    with pytest.raises(UserError, match="evaluate"):
        read_runs(tmp_path)


def test_metrics_are_those_of_the_erased_model_by_purpose(finished):
    metrics = {"base/summary/h_o": 1.0, "cost/seconds": 2.0, "accuracy/other": 3.0, "robustness/asr_cce": 4.0} | METRICS
    run = read_run(finished(metrics=metrics))
    assert metric_names([run]) == [
        "efficacy/acc_e",
        "fidelity/fid",
        "robustness/asr_cce",
        "accuracy/other",
        "cost/seconds",
    ]
    assert run.value("summary/h_o") is None and run.value("nothing") is None


def test_base_and_erased_come_before_other_drawings(finished):
    run = finished(pictures=[("a cat", "erase", "cat", 1)], attacks={"p4d": "k", "cce": "k"})
    assert list(drawings(run)) == ["base", "erased", "attacked-cce", "attacked-p4d"]

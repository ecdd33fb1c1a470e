"""Likely mistakes on the command line get a suggestion."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import MissingConfigException

from unlearning.config.suggestions import explain

REAL = Path(__file__).parents[2] / "conf"

TREE = {
    "config.yaml": """
        defaults: [{method: esd_x}, {dataset: objects}, {attack: []}, {evaluator: [fid, accuracy]}, _self_]
        attack: {}
        concept: cat
        seed: 0""",
    "method/_base.yaml": "steps: 100",
    "method/esd_x.yaml": "{defaults: [_base], eta: 1.0}",
    "method/uce.yaml": "lamb: 1.0",
    "method/broken.yaml": "defaults: [zzzz]",
    "dataset/objects.yaml": "name: objects",
    "dataset/folder.yaml": "path: ???",
    "attack/cce.yaml": "# @package attack.cce\niterations: 10",
    "evaluator/fid.yaml": "# @package evaluator.fid\nimages: 10",
    "evaluator/accuracy.yaml": "# @package evaluator.accuracy\nbatch_size: 8",
    "evaluator/nudenet.yaml": "# @package evaluator.nudenet\nthreshold: 0.6",
    "experiment/table1.yaml": "# @package _global_\nseed: 1",
}


@pytest.fixture
def conf(tmp_path):
    for name, text in TREE.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text.replace("\n        ", "\n"))
    return tmp_path


def message(conf: Path, *argv: str) -> str:
    """The error message for a user who types `unlearn argv`."""
    with pytest.raises(Exception) as caught, initialize_config_dir(str(conf), version_base="1.3"):
        config = compose("config", overrides=list(argv))
        assert config.dataset.path
    return explain(caught.value, conf, argv)


@pytest.mark.parametrize(
    ("argv", "key", "suggestion"),
    [
        (["concpet=cat"], "concpet", "concept"),
        (["methd=uce"], "methd", "method"),
        (["method=esdx"], "method `esdx`", "esd_x"),
        (["method=ESD-x"], "method `ESD-x`", "esd_x"),
        (["method.etaa=2"], "method has no setting `etaa`", "eta"),
        (["eta=2"], "eta", "method.eta"),
        (["evaluator=[fidd]"], "evaluator `fidd`", "fid"),
        (["attack=[ccee]"], "attack `ccee`", "cce"),
        (["evaluator.fid.imags=3"], "evaluator.fid has no setting `imags`", "images"),
        (["evaluator.fidd.images=3"], "evaluator has no setting `fidd`", "fid"),
        (["uce"], "uce", "method=uce"),
    ],
)
def test_a_mistake_gets_a_suggestion(conf, argv, key, suggestion):
    answer = message(conf, *argv)
    assert key in answer.partition("Did you mean")[0] and f"Did you mean {suggestion}" in answer


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["seed=1", "concept=tabby", "cat"], "'concept=tabby cat'"),
        (["concept=cat,", "dog"], "'concept=[cat,dog]'"),
    ],
)
def test_a_value_split_by_the_shell_gets_the_command_to_type(conf, argv, line):
    assert message(conf, *argv).endswith(f"type {line}")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["method=zzzz"], ["method `zzzz`", "broken, esd_x, uce"]),
        (["method=uce", "method.zzzz=2"], ["method has no setting `zzzz`", "lamb"]),
        (["evaluator.nudenet.threshold=1"], ["`nudenet`", "`evaluator=[accuracy,fid,nudenet]`"]),
        (["attack.cce.iterations=1"], ["`cce`", "`attack=[cce]`"]),
        (["dataset=folder"], ["`dataset.path=...`"]),
        (["experiment=table1"], ["'experiment'"]),
        (["method.eta=[1"], ["`method.eta=[1`"]),
        (["method=broken"], ["zzzz", "`method/broken`"]),
        (["+seed=3"], ["'seed'"]),
        (["~sed"], ["'sed'"]),
    ],
)
def test_a_mistake_without_a_near_name_is_explained(conf, argv, words):
    answer = message(conf, *argv)
    assert all(word in answer for word in words) and "Did you mean" not in answer


def test_a_missing_plugin_names_the_extra_that_installs_it(conf):
    error = MissingConfigException("", missing_cfg_file="hydra/launcher/joblib", options=["basic"])
    assert "pip install 'concept-unlearning[sweeps]'" in explain(error, conf)


def test_other_errors_keep_their_message(conf):
    assert explain(ValueError("one\ntwo\n\nthree"), conf, []) == "one\ntwo"
    assert explain(ValueError(), conf, []) == "ValueError"


@pytest.mark.parametrize(("argv", "suggestion"), [("concpet=cat", "concept"), ("method=esdx", "esd_x")])
def test_the_real_configuration(argv, suggestion):
    with pytest.raises(Exception) as caught, initialize_config_dir(str(REAL), version_base="1.3"):
        compose("config", overrides=[argv])
    assert f"Did you mean {suggestion}?" in explain(caught.value, REAL, [argv])


def test_error_messages_need_no_heavy_import():
    heavy = "{'torch', 'pytorch_lightning', 'diffusers', 'transformers', 'wandb'} & set(sys.modules)"
    program = f"import sys, unlearning.config.suggestions; assert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", program], check=True)

"""Every mistake a user is likely to make at the command line is answered with what was probably meant."""

import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from unlearning.config.suggestions import explain

REAL = Path(__file__).parents[1] / "conf"

TREE = {
    "config.yaml": """
        defaults: [{method: esd_x}, {dataset: objects}, {evaluator: [fid, accuracy]}, _self_]
        concept: cat
        seed: 0""",
    "method/_base.yaml": "steps: 100",
    "method/esd_x.yaml": "{defaults: [_base], eta: 1.0}",
    "method/uce.yaml": "lamb: 1.0",
    "method/broken.yaml": "defaults: [esd_y]",
    "dataset/objects.yaml": "name: objects",
    "dataset/folder.yaml": "path: ???",
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


def said(conf: Path, *argv: str) -> str:
    """What a user is told who types `unlearn argv`."""
    with pytest.raises(Exception) as caught, initialize_config_dir(str(conf), version_base="1.3"):
        config = compose("config", overrides=list(argv))
        assert config.dataset.path
    return explain(caught.value, conf, argv)


@pytest.mark.parametrize(
    ("argv", "answer"),
    [
        (["concpet=cat"], "There is no setting `concpet`. Did you mean `concept`?"),
        (["methd=uce"], "There is no setting `methd`. Did you mean `method`?"),
        (["method=esdx"], "There is no method `esdx`. Did you mean `esd_x`? Methods: broken, esd_x, uce."),
        (["method=ESD-x"], "There is no method `ESD-x`. Did you mean `esd_x`? Methods: broken, esd_x, uce."),
        (["method=zzzz"], "There is no method `zzzz`. Methods: broken, esd_x, uce."),
        (["method.etaa=2"], "method has no setting `etaa`. Did you mean `eta`?"),
        (["method=uce", "method.zzzz=2"], "method has no setting `zzzz`. Settings: lamb."),
        (["eta=2"], "There is no setting `eta`. Did you mean `method.eta`?"),
        (["evaluator=[fidd]"], "There is no evaluator `fidd`. Did you mean `fid`? Evaluators: accuracy, fid, nudenet."),
        (["evaluator.fid.imags=3"], "evaluator.fid has no setting `imags`. Did you mean `images`?"),
        (["evaluator.fidd.images=3"], "evaluator has no setting `fidd`. Did you mean `fid`?"),
        (
            ["evaluator.nudenet.threshold=1"],
            "The evaluator `nudenet` is not part of this run. Choose it too: `evaluator=[accuracy,fid,nudenet]`.",
        ),
        (["experiment=table1"], "Could not override 'experiment'. No match in the defaults list.\nTo append"),
        (["dataset=folder"], "`dataset.path` has no value. Give it one: `dataset.path=...`."),
        (["uce"], "`uce` is not of the form setting=value. Did you mean `method=uce`?"),
        (["seed=1", "concept=tabby", "cat"], "Cannot read `cat`. Did you mean 'concept=tabby cat', with the quotes?"),
        (["concept=cat,", "dog"], "Cannot read `concept=cat,`. Did you mean 'concept=[cat, dog]', with the quotes?"),
        (["+seed=3"], "Could not append to config. An item is already at 'seed'."),
        (["~sed"], "Could not delete from config. 'sed' does not exist."),
    ],
)
def test_a_mistake_is_answered_with_what_was_meant(conf, argv, answer):
    assert said(conf, *argv).startswith(answer)


def test_an_unreadable_override_is_named(conf):
    assert "`method.eta=[1`" in said(conf, "method.eta=[1")


def test_the_file_that_asks_for_a_missing_choice_is_named(conf):
    assert said(conf, "method=broken").endswith("(`method/broken` asks for it.)")


def test_any_other_error_speaks_for_itself(conf):
    assert explain(ValueError("one\ntwo\n\nthree"), conf, []) == "one\ntwo"
    assert explain(ValueError(), conf, []) == "ValueError"


@pytest.mark.parametrize(("argv", "answer"), [("concpet=cat", "`concept`"), ("method=esdx", "`esd_x`")])
def test_the_real_configuration(argv, answer):
    with pytest.raises(Exception) as caught, initialize_config_dir(str(REAL), version_base="1.3"):
        compose("config", overrides=[argv])
    assert f"Did you mean {answer}?" in explain(caught.value, REAL, [argv])


def test_nothing_heavy_is_imported_for_an_answer():
    heavy = "{'torch', 'pytorch_lightning', 'diffusers', 'transformers', 'wandb'} & set(sys.modules)"
    program = f"import sys, unlearning.suggestions; assert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", program], check=True)

"""Which settings decide a result. Folder names, tables and the check for finished runs depend on it."""

import subprocess
import sys

import pytest

from tests.composed import config
from unlearning.config.decisive import decides, decisive
from unlearning.config.naming import config_hash


@pytest.mark.parametrize(
    ("name", "results"),
    [
        ("model.path", ["erasure", "images", "numbers", "folder"]),
        ("model.autocast", ["erasure", "images", "numbers", "folder"]),
        ("method.batch_size", ["erasure", "images", "numbers", "folder"]),
        ("student@method.student", ["erasure", "images", "numbers", "folder"]),
        ("trainer.devices", ["erasure", "images", "numbers", "folder"]),
        ("sampler.steps", ["images", "numbers", "folder"]),
        ("attack.cce.iterations", ["numbers", "folder"]),
        ("evaluator.fid.count", ["numbers", "folder"]),
        ("logger", ["folder"]),
        ("evaluator.accuracy.classifier.device", []),
        ("paths.store", ["folder"]),
        ("method.generated.store", []),
        ("method.generated.sampler.batch_size", []),
        ("method.generated.sampler.steps", ["erasure", "images", "numbers", "folder"]),
        ("model.gradient_checkpointing", []),
        ("sampler.batch_size", []),
        ("trainer.callbacks.0.every_n_train_steps", []),
        ("trainer.accelerator", []),
        ("stages", []),
        ("objective", []),
    ],
)
def test_a_setting_decides_results_from_one_stage_on(name, results):
    assert [r for r in ("erasure", "images", "numbers", "folder") if decides(name, r)] == results


def test_settings_that_decide_no_result_are_removed_at_any_depth():
    settings = {
        "model": {"path": "here", "device": "cpu", "compile": True},
        "evaluator": {"fid": {"count": 3, "features": {"mode": "clean", "device": "cuda"}}},
        "trainer": {"precision": "32-true", "callbacks": [{"dirpath": "there"}]},
        "stages": ["fit"],
    }
    images = {"model": {"path": "here"}, "trainer": {"precision": "32-true"}}
    assert decisive(settings) == images
    assert decisive(settings, "numbers") == images | {"evaluator": {"fid": {"count": 3, "features": {"mode": "clean"}}}}


def test_runs_with_the_same_images_have_one_name(tmp_path):
    overrides = [
        "model.gradient_checkpointing=true", "model.attention_slicing=true", "model.compile=true", "model.device=auto",
        "sampler.batch_size=1", "evaluator=nudenet", "stages=[fit]", "title=another", "trainer.log_every_n_steps=5",
        "trainer.accelerator=auto", "+trainer.default_root_dir=${paths.output_dir}",
        "trainer.callbacks=[{dirpath: '${paths.output_dir}'}]",
    ]  # fmt: skip
    assert config_hash(config(tmp_path, "method=uce", *overrides)) == config_hash(config(tmp_path, "method=uce"))


def test_runs_with_other_images_have_other_names(tmp_path):
    overrides = ["method.lamb=0.1", "sampler.steps=3", "model.dtype=bfloat16", "+trainer.not_known_yet=1",
                 "concept=dog"]  # fmt: skip
    hashes = {config_hash(config(tmp_path, "method=uce", override)) for override in ["seed=0", "seed=1", *overrides]}
    assert len(hashes) == 2 + len(overrides)


def test_no_heavy_import_is_needed():
    heavy = "{'hydra', 'omegaconf', 'torch'} & set(sys.modules)"
    program = f"import sys, unlearning.config.decisive; assert not {heavy}, {heavy}"
    subprocess.run([sys.executable, "-c", program], check=True)

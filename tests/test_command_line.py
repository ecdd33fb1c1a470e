"""What a user meets in a terminal: quick answers, and for every mistake one message and an exit code other than 0."""

import errno
import logging
import pickle
import resource
import shutil
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import pytest
import torch
import yaml
from annotated_types import Ge
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from tests import tiny
from tests.run.small import files
from unlearning import run
from unlearning.attacks.base import Attack, prompts_of
from unlearning.config.precision import _has_accelerator
from unlearning.erasures.base import Erasure
from unlearning.erasures.weight_patch import WeightPatch
from unlearning.methods.base import Method
from unlearning.models.stable_diffusion_xl import StableDiffusionXL
from unlearning.sampling.attack_result import AttackedPrompt, AttackResult
from unlearning.store import locks

WATCHED = """
import atexit, sys
heavy = ["torch", "torchvision", "diffusers", "transformers", "pytorch_lightning", "wandb", "nudenet", "scipy"]
atexit.register(lambda: print("IMPORTED", *[name for name in heavy if name in sys.modules]))
from unlearning.__main__ import main
main()
"""


def python(*arguments: str, cwd) -> tuple[subprocess.CompletedProcess, float]:
    """A process, and the seconds that it took of a processor."""
    start = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd)
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime


# --- quick answers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argument", "answer", "code"),
    [
        ("--help", "method: ", 0),
        ("concpet=cat", "Did you mean concept?", 1),
        ("method=esdx", "Did you mean esd_x?", 1),
    ],
)
def test_help_and_typos_need_no_heavy_import(tmp_path, argument, answer, code):
    done, seconds = python("-c", WATCHED, argument, cwd=tmp_path)
    message = done.stdout + done.stderr
    assert done.returncode == code and answer in message, message
    assert "Traceback" not in message
    assert done.stdout.splitlines()[-1] == "IMPORTED", "nothing heavy is imported for an answer"
    assert seconds <= 2
    assert list(tmp_path.iterdir()) == [], "nothing is written"


def test_a_mistake_is_one_message_and_exit_code_1_before_torch_is_imported(tmp_path):
    done, _ = python("-c", WATCHED, "concept=kat", cwd=tmp_path)
    assert done.returncode == 1
    assert "'kat'. Did you mean cat" in done.stderr.rstrip().splitlines()[-1]
    assert "torch" not in done.stdout.split() or _has_accelerator(), "whose precision only torch knows"
    assert not any(noise in done.stderr + done.stdout for noise in ("Traceback", "Error executing", "overrides:"))
    assert not list(tmp_path.rglob("erasure")) and not (tmp_path / "outputs" / "store").exists()


# --- concepts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "answer"),
    [
        (["dataset=cifar10_objects", "concept=apple"], "CIFAR-10 class named 'apple'"),
        (["dataset=emoji_styles", "concept=neonn"], "Did you mean neon?"),
        (["dataset=folder", "concept=mug"], "dataset=folder needs forget="),
        (["dataset=folder", "concept=''", "forget=here"], "dataset=folder needs concept='...'"),
        (["dataset=folder", "concept=mug", "forget=/not/there"], "There is no folder /not/there."),
    ],
)
def test_a_concept_that_cannot_be_erased_is_reported_before_anything_is_loaded(
    error_of, monkeypatch, overrides, answer
):
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", None)  # to call it would be an error
    assert answer in error_of(*overrides)


def test_an_empty_forget_set_is_named(error_of, tmp_path):
    (tmp_path / "mugs").mkdir()
    message = error_of("dataset=folder", "concept=mug", f"forget={tmp_path}/mugs")
    assert f"{tmp_path}/mugs" in message and "no image" in message


def test_free_text_is_erased_with_any_model(unlearn):
    run = unlearn("dataset=prompt", "concept='a kat, by nobody: 100%'", "method=negative_prompt")
    assert "a kat, by nobody: 100%" in (run / "erasure" / "erasure.json").read_text()
    assert "a photo of the a kat, by nobody: 100%" in (run / "images" / "base.csv").read_text()
    assert (run / "report.html").exists()


def test_progress_bars_can_be_turned_off_and_libraries_say_nothing(unlearn, capfd):
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.INFO)  # as their import leaves them
    unlearn("dataset=prompt", "method=uce", "trainer.enable_progress_bar=false", "stages=[fit,generate]")
    shown = "".join(capfd.readouterr())
    assert "erased by uce: generate" in shown
    assert not any(word in shown for word in ("it/s", "Loading", "GPU available", "litlogger"))
    assert not any(line.split() == ["base", "erased"] for line in shown.splitlines()), "a table without numbers"


def test_every_progress_bar_names_the_model_that_generates(unlearn, capfd):
    few = ["dataset=prompt", "attack=[paraphrase]", "stages=[fit,attack,generate]"]
    unlearn("method=uce", *few, "trainer.enable_progress_bar=true")
    shown = capfd.readouterr().err
    assert all(f"images of {name}:" in shown for name in ("base", "erased", "attacked-paraphrase"))


# --- models -----------------------------------------------------------------------------------------------------------


class Bomb:
    """A pickle that writes a file if it is loaded."""

    def __init__(self, witness):
        self.witness = str(witness)

    def __reduce__(self):
        return open, (self.witness, "w")


def test_a_pickled_checkpoint_is_refused_unopened(error_of, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(pickle.dumps(Bomb(tmp_path / "witness")))
    message = error_of(f"model.path={tmp_path}/model.ckpt")
    assert "pickled checkpoint" in message and "diffusers folder" in message
    assert not (tmp_path / "witness").exists()


def test_pickled_weights_in_a_folder_are_refused_unopened(error_of, tmp_path, sd1):
    folder = shutil.copytree(sd1, tmp_path / "model")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.with_suffix(".bin").write_bytes(pickle.dumps(Bomb(tmp_path / "witness")))
    weights.unlink()
    assert f"No model could be loaded from '{folder}'" in error_of(f"model.path={folder}")
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize("path", ["/not/there", "not-there", "a/b/c"])
def test_a_model_that_is_not_there_is_named(error_of, tmp_path, path):
    message = error_of(f"model.path={path}")
    assert f"There is no model folder at {path}." in message and "model.path" in message
    assert not (tmp_path / "run" / "erasure").exists() and not (tmp_path / "store").exists()


def test_a_model_of_the_hub_without_a_network_is_named(error_of):
    message = error_of("model.path=nobody/nothing")
    assert "No model could be loaded from 'nobody/nothing'" in message and "hf download nobody/nothing" in message


def test_a_folder_that_is_no_pipeline_is_named(error_of, tmp_path):
    (tmp_path / "folder").mkdir()
    assert f"{tmp_path}/folder holds no model_index.json" in error_of(f"model.path={tmp_path}/folder")


def test_truncated_weights_are_reported(error_of, tmp_path, sd1):
    folder = shutil.copytree(sd1, tmp_path / "model")
    weights = folder / "text_encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert f"No model could be loaded from '{folder}'" in error_of(f"model.path={folder}")


@pytest.mark.parametrize("part", ["unet/diffusion_pytorch_model", "text_encoder/model"])
def test_missing_weights_give_only_this_packages_message(error_of, tmp_path, sd1, part, capfd):
    folder = shutil.copytree(sd1, tmp_path / "model")
    weights = load_file(file := folder / f"{part}.safetensors")
    gone = next(iter(weights))
    save_file({name: value for name, value in weights.items() if name != gone}, file, {"format": "pt"})
    assert gone.removeprefix("text_model.") in error_of(f"model.path={folder}")
    shown = "".join(capfd.readouterr())
    assert "initialized" not in shown and "TRAIN" not in shown and "MISSING" not in shown


def test_two_models_of_the_hub_are_never_mixed_up(unlearn, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "0" * 40
    for seed, name in enumerate(("one", "two")):
        cached = tmp_path / "hub" / f"models--somebody--{name}"
        (cached / "refs").mkdir(parents=True)
        (cached / "refs" / "main").write_text(commit)
        tiny.pipeline("sd1", seed).save_pretrained(cached / "snapshots" / commit)
    runs = [
        unlearn("dataset=prompt", f"model.path=somebody/{name}", "stages=[fit,generate]", run=name)
        for name in ("one", "two")
    ]
    assert (runs[0] / "images" / "base.csv").read_text() != (runs[1] / "images" / "base.csv").read_text()


# --- methods that do not go with a model ------------------------------------------------------------------------------


class OnlySDXL(Method):
    """A method of one family."""

    works_on = StableDiffusionXL

    def fit(self, model, task):
        return WeightPatch({})


def test_a_method_of_another_family_is_refused_before_a_weight_is_loaded(error_of, tmp_path, monkeypatch):
    loads = []
    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", lambda *a, **k: loads.append(a))
    message = error_of("method._target_=tests.test_command_line.OnlySDXL", "model.path=/not/there")
    assert all(name in message for name in ("OnlySDXL", "StableDiffusionXL", "StableDiffusion."))
    assert not loads and not (tmp_path / "run" / "erasure").exists()


# --- attacks and earlier erasures -------------------------------------------------------------------------------------


class Echo(Attack):
    """An attack that prompts the same again."""

    access = "black"

    def __init__(self, *, times: Annotated[int, Ge(1)] = 1):
        self.times = times

    def find(self, model, task, rows, observed):
        return AttackResult(
            tuple(AttackedPrompt(row.prompt, " ".join([row.prompt] * self.times)) for row in prompts_of(rows))
        )


@pytest.fixture
def echo(tmp_path):
    """The overrides that choose the attack."""
    (tmp_path / "conf" / "attack").mkdir(parents=True)
    (tmp_path / "conf" / "attack" / "echo.yaml").write_text(
        f"# @package attack.echo\n_target_: {__name__}.Echo\ntimes: 1\n"
    )
    return [f"hydra.searchpath=[file://{tmp_path}/conf]", "dataset=prompt", "dataset.others=[dog]", "attack=[echo]"]


def test_an_attack_is_chosen_and_set_like_an_evaluator(unlearn, echo):
    folder = unlearn(*echo, "attack.echo.times=2", "evaluator=clip_score")
    assert "a photo of the cat a photo of the cat" in (folder / "images" / "attacked-echo.csv").read_text()
    assert yaml.safe_load((folder / ".hydra" / "resolved.yaml").read_text())["attack"]["echo"]["times"] == 2


@pytest.mark.parametrize(
    ("override", "key", "suggestion"),
    [
        ("attack.echo.tims=2", "attack.echo has no setting `tims`", "times"),
        ("attack.eco.times=2", "attack has no setting `eco`", "echo"),
        ("objective=robustness/clip_score_e_ecoh", "robustness/clip_score_e_ecoh", "robustness/clip_score_e_echo"),
    ],
)
def test_a_typo_in_an_attack_gets_a_suggestion(error_of, echo, override, key, suggestion):
    message = error_of(
        *(o for o in echo if not o.startswith(override.partition("=")[0])), override, "evaluator=clip_score"
    )
    assert key in message and f"Did you mean {suggestion}" in message


def test_a_value_out_of_range_is_named(error_of, echo):
    message = error_of(*echo, "attack.echo.times=0")
    assert "`attack.echo.times`" in message and "1" in message


def test_a_stored_attack_without_its_tensors_is_made_again(unlearn, error_of, echo, tmp_path, monkeypatch):
    made = []

    def find(self, model, task, rows, observed):
        made.append(self)
        one = AttackedPrompt(rows[0].prompt, rows[0].prompt, tensors={"own": torch.ones(1)})
        return AttackResult((one,), shared={"common": torch.ones(1)})

    monkeypatch.setattr(Echo, "find", find)
    unlearn(*echo, "stages=[fit,attack]")
    for file, content in (("0", None), ("shared", b"half")):
        [kept] = (tmp_path / "store" / "attacks").glob(f"*/{file}.safetensors")
        kept.unlink()
        if content is not None:
            kept.write_bytes(content)
        assert "run the attack stage first" in error_of(*echo, "stages=[generate]")
        run = unlearn(*echo, "stages=[fit,attack,generate]", run=f"without-{file}")
        assert kept.stat().st_size > 8 and (run / "images" / "attacked-echo.csv").exists()
    assert len(made) == 3


def test_an_attack_of_another_family_is_refused(error_of, echo, monkeypatch):
    monkeypatch.setattr(Echo, "works_on", StableDiffusionXL)
    assert "Echo works on a StableDiffusionXL" in error_of(*echo)


def test_a_run_resumes_from_earlier_erasures(unlearn):
    first = unlearn("dataset=prompt", "method=uce", "stages=[fit]", run="first") / "erasure"
    run = unlearn("dataset=prompt", "method=negative_prompt", f"after=[{first},{first}]", "stages=[fit]")
    assert [type(part).__name__ for part in Erasure.load(run / "erasure").parts] == ["WeightPatch", "GuidanceEdit"]


def test_an_earlier_erasure_that_is_not_there_is_named(error_of, tmp_path):
    assert f"{tmp_path}/nowhere" in error_of("dataset=prompt", f"after={tmp_path}/nowhere", "stages=[fit]")


# --- many runs --------------------------------------------------------------------------------------------------------


def test_a_sweep_has_a_folder_for_every_run(unlearn, tmp_path):
    unlearn("-m", f"paths.runs={tmp_path}/runs", "method=none,uce", "concept=a cat,a dog", "dataset=prompt",
            "stages=[fit]")  # fmt: skip
    runs = sorted(str(p.parent.relative_to(tmp_path / "runs")) for p in tmp_path.glob("runs/**/erasure"))
    assert [r.rpartition("-")[0] for r in runs] == [
        f"emoji_unet/prompt/{concept}/{method}/seed0" for concept in ("a-cat", "a-dog") for method in ("none", "uce")
    ]


def test_a_sweep_resumes_where_something_was_skipped_and_a_single_run_says_so(unlearn, error_of, tmp_path, capsys):
    (tmp_path / "list.csv").write_text("prompt,evaluation_seed,evaluation_guidance\na cat,1,7\na dog,none,7\n")
    listed = ["dataset=prompt_list", f"dataset.path={tmp_path}/list.csv", "evaluator=clip_score"]
    assert "images or rows that were skipped: 1" in error_of(*listed)
    capsys.readouterr()
    unlearn("-m", *listed, f"paths.runs={tmp_path}/runs", "objective=efficacy/clip_score_e", "seed=0,1")
    assert capsys.readouterr().out.count("images or rows that were skipped: 1") == 2
    assert len(list(tmp_path.rglob("failed.json"))) == 0 and len(list(tmp_path.glob("runs/**/.finished"))) == 2


@pytest.mark.parametrize("meanwhile", [True, False], ids=["which does it", "which is killed"])
def test_a_job_of_a_sweep_waits_for_another_run(unlearn, tmp_path, monkeypatch, meanwhile):
    command = ["-m", f"paths.runs={tmp_path}/runs", "dataset=prompt", "stages=[fit]"]
    unlearn(*command)
    [mark] = tmp_path.rglob(".finished")
    mark.rename(tmp_path / "mark")
    other, logged, info = ExitStack(), [], run.log.info

    def recorded(message: str, *arguments):
        logged.append(message % arguments)
        if "waiting for it" in message:
            if meanwhile:
                (tmp_path / "mark").rename(mark)
            other.close()
        info(message, *arguments)

    monkeypatch.setattr(run.log, "info", recorded)
    monkeypatch.setattr(locks.log, "info", recorded)
    other.enter_context(locks.alone_in(mark.parent))
    unlearn(*command)
    assert logged[0].startswith("Another run is at work in") and ("erased by none: fit" in "".join(logged)) != meanwhile


def test_the_recorded_settings_are_those_of_the_results(unlearn):
    folder = unlearn("dataset=prompt", "evaluator=clip_score", "trainer.log_every_n_steps=2")
    before = files(folder / ".hydra")
    resolved = (folder / ".hydra" / "resolved.yaml").read_text()
    assert "${" not in resolved and f"output_dir: {folder}" in resolved and "log_every_n_steps: 2" in resolved
    unlearn("dataset=prompt", "evaluator=nudenet", "stages=[fit,generate,report]")
    assert files(folder / ".hydra") == before
    unlearn("dataset=prompt", "evaluator=nudenet", "stages=[evaluate]")
    for name in ("config", "resolved"):
        assert {*yaml.safe_load((folder / ".hydra" / f"{name}.yaml").read_text())["evaluator"]} == {"nudenet"}


def test_a_finished_run_in_a_folder_that_can_only_be_read_is_shown(unlearn, monkeypatch, capsys):
    settings = ["method=uce", "dataset=prompt", "evaluator=clip_score"]
    run = unlearn(*settings)
    (run / "__main__.log").unlink(missing_ok=True)
    before = files(run)

    def refused(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(logging.FileHandler, "_open", refused)
    monkeypatch.setattr(Path, "replace", refused)
    capsys.readouterr()
    unlearn(*settings)
    assert "efficacy/clip_score_e" in capsys.readouterr().out
    assert files(run) == before

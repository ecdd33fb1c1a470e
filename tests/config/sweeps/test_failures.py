"""Jobs that would overwrite each other are refused; failed jobs are reported, and the others run."""

import json
import os
import signal

import pytest

from tests.config.sweeps.commands import metrics
from tests.run.small import at_call, ctrl_c
from unlearning.config.sweeps import reason
from unlearning.errors import UserError
from unlearning.methods.uce import UCE
from unlearning.sampling.sampler import Sampler

# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "jobs"),
    [
        (["seed=0,1", "judge=emoji,openai"], "The jobs of `judge=emoji` and `judge=openai` would have one folder, "),
        (["method=none,uce", "evaluator=fid,[accuracy]"], "The jobs of `evaluator=fid` and `evaluator=[accuracy]`"),
    ],
)
def test_jobs_that_would_overwrite_each_other_are_refused_before_any_is_run(error_of, tmp_path, overrides, jobs):
    message = error_of(*overrides)
    assert jobs in message and "python -m unlearning.evaluators.nudenet" in message
    assert not list(tmp_path.rglob("metrics.json")) and not list(tmp_path.rglob("erasure"))


def test_a_study_whose_trials_would_overwrite_each_other_is_refused(error_of):
    search = ["evaluator=nudenet", "evaluator.nudenet.threshold=interval(0.3,0.9)", "objective=efficacy/nudenet_rate"]
    assert "`evaluator.nudenet.threshold=0.3` and `ev" in error_of("hydra/sweeper=study", *search)


def test_jobs_with_folders_of_their_own_are_not_refused(sweep, tmp_path, batches):
    sweep("seed=0,0", f"paths.runs={tmp_path}/runs,{tmp_path}/others")
    assert [len(jobs) for jobs in batches] == [4]


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_failed_job_is_recorded_and_the_others_run(sweep, error_of, tmp_path, monkeypatch):
    command = ["method=uce", "seed=0,1", "stages=[fit,generate,evaluate]"]
    with monkeypatch.context() as patch:
        at_call(patch, UCE, "fit", 1, lambda: 1 / 0)
        message = error_of(*command)
    assert set(metrics(tmp_path / "runs")) == {"uce/seed1"}
    [record] = (tmp_path / "runs").rglob("failed.json")
    first, line = message.strip().splitlines()
    assert first.startswith("1 job failed.")
    assert line == f"{os.path.relpath(record.parent)}: ZeroDivisionError: division by zero"
    failed = json.loads(record.read_text())
    assert "uce/seed0" in failed["folder"] and "method=uce" in failed["job"] and "1 / 0" in failed["traceback"]

    sweep(*command)
    assert len(metrics(tmp_path / "runs")) == 2 and not record.exists(), "the same command mends it"


def test_a_mistake_in_one_job_is_reported_with_its_own_message(error_of, tmp_path, sd1):
    message = error_of(f"model.path=/not/there,/nor/here,{sd1}", "stages=[fit]")
    assert message.strip().startswith("2 jobs failed") and "There is no model folder at /nor/here." in message
    assert len(list(tmp_path.rglob("erasure"))) == 1


def test_ctrl_c_stops_the_whole_sweep(error_of, tmp_path, monkeypatch):
    at_call(monkeypatch, UCE, "fit", 2, ctrl_c)
    assert error_of("method=uce", "seed=0,1,2", "stages=[fit]").startswith("Interrupted")
    [done] = (tmp_path / "runs").rglob("erasure")
    assert done.parent.name.startswith("seed0-") and not list(tmp_path.rglob("failed.json"))


def test_a_termination_stops_the_whole_sweep(error_of, tmp_path, monkeypatch):
    draw = Sampler.draw

    def terminated(self, *arguments):
        signal.raise_signal(signal.SIGTERM)  # of which Lightning makes a note; the next denoiser call heeds it
        return draw(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "draw", terminated)
        message = error_of("method=none", "seed=0,1", "sampler.batch_size=1")
    assert message.startswith("Interrupted")
    assert not list((tmp_path / "store").rglob("*.png")) and not list(tmp_path.rglob("failed.json"))


def test_a_reason_is_one_line():
    fault = RuntimeError("Error in call to target 'x':\nTypeError()")
    fault.__cause__ = ValueError("one\ntwo")
    assert reason(fault) == "ValueError: one"
    fault.__cause__ = UserError("Do this.\nOr that.")
    assert reason(fault) == "Do this." and reason(KeyError()) == "KeyError"

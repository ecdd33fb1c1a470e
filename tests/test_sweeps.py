"""Sweeps of a tiny model: what fails is told and the rest is done, what is done is not done again, jobs share."""

import fcntl
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from diffusers import StableDiffusionPipeline
from hydra import compose, initialize_config_dir
from PIL import Image

from tests.run.small import at_call, ctrl_c, files
from unlearning import sharing
from unlearning.__main__ import CONF
from unlearning.concepts import UserError
from unlearning.evaluators.accuracy import Accuracy
from unlearning.methods.uce import UCE
from unlearning.run import Run
from unlearning.sampling.sampler import Sampler
from unlearning.sweeps import objective, reason

SWEEP = yaml.safe_load((CONF.parent / "experiments/sweeps/wandb.yaml").read_text())
FEW = ["-m", "dataset=prompt", "dataset.others=[dog]"]  # two pictures a run


@pytest.fixture
def sweep(unlearn, tmp_path):
    """sweep(*overrides) -> the folder of all runs."""

    def call(*overrides: str) -> Path:
        unlearn(*FEW, f"paths.runs={tmp_path}/runs", *overrides)
        return tmp_path / "runs"

    return call


@pytest.fixture
def told_by(sweep):
    """What is said at the end of a sweep in which something fails."""

    def call(*overrides: str) -> str:
        with pytest.raises(SystemExit) as caught:
            sweep(*overrides)
        return caught.value.code

    return call


@pytest.fixture
def loads(monkeypatch):
    """How often a model was loaded since the last `loads()`."""
    seen = [0]
    load = StableDiffusionPipeline.from_pretrained.__func__

    def counted(cls, *arguments, **keywords):
        seen[0] += 1
        return load(cls, *arguments, **keywords)

    monkeypatch.setattr(StableDiffusionPipeline, "from_pretrained", classmethod(counted))

    def count() -> int:
        new, seen[0] = seen[0], 0
        return new

    return count


def metrics(runs: Path) -> dict[str, dict]:
    """Every run's numbers, by method and seed."""
    found = runs.rglob("metrics.json")
    return {"/".join(p.parts[-3:-1]).rpartition("-")[0]: json.loads(p.read_text()) for p in found}


def numbers(runs: Path) -> dict[str, dict]:
    """Those that do not depend on the machine."""
    return {run: {k: v for k, v in m.items() if not k.startswith("cost/")} for run, m in metrics(runs).items()}


# --- folders ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "jobs"),
    [
        (["evaluator=nudenet", "evaluator.nudenet.threshold=0.25,0.6"], "`evaluator.nudenet.threshold=0.25` and `ev"),
        (["seed=0,1", "judge=emoji,openai"], "The jobs of `judge=emoji` and `judge=openai` would have one folder, "),
        (["method=none,uce", "evaluator=fid,[accuracy]"], "The jobs of `evaluator=fid` and `evaluator=[accuracy]`"),
        (["stages=[fit],[generate]"], "The jobs of `stages=[fit]` and `stages=[generate]` would have one folder"),
    ],
)
def test_jobs_that_would_overwrite_each_other_are_refused_before_any_is_run(told_by, tmp_path, overrides, jobs):
    said = told_by(*overrides)
    assert jobs in said and "python -m unlearning.evaluators.nudenet" in said
    assert not list(tmp_path.rglob("metrics.json")) and not list(tmp_path.rglob("erasure"))


def test_a_study_whose_trials_would_overwrite_each_other_is_refused(told_by):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    search = ["evaluator=nudenet", "evaluator.nudenet.threshold=interval(0.3,0.9)", "objective=efficacy/nudenet_rate"]
    assert "`evaluator.nudenet.threshold=0.3` and `ev" in told_by("hydra/sweeper=study", *search)


def test_jobs_with_folders_of_their_own_are_not_refused(sweep, tmp_path):
    sweep("method=none", "seed=0,0", "stages=[fit]")
    sweep("method=none", f"paths.runs={tmp_path}/runs,{tmp_path}/others", "stages=[fit]")


# --- failures ---------------------------------------------------------------------------------------------------------


def test_a_job_that_fails_is_written_down_and_the_others_are_done(sweep, told_by, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, UCE, "fit", 1, lambda: 1 / 0)
        said = told_by("method=uce", "seed=0,1")
    assert set(metrics(tmp_path / "runs")) == {"uce/seed1"}
    [record] = (tmp_path / "runs").rglob("failed.json")
    first, line = said.strip().splitlines()
    assert first.startswith("1 job failed; the others are done.")
    assert line == f"{os.path.relpath(record.parent)}: ZeroDivisionError: division by zero"
    failed = json.loads(record.read_text())
    assert "uce/seed0" in failed["folder"] and "method=uce" in failed["job"] and "1 / 0" in failed["traceback"]

    sweep("method=uce", "seed=0,1")
    assert len(metrics(tmp_path / "runs")) == 2 and not record.exists(), "the same command mends it"


def test_a_mistake_in_one_job_is_told_in_its_own_words(told_by, tmp_path):
    said = told_by("method=none", "model.path=/not/there,/nor/here,${paths.weights}/emoji_unet", "stages=[fit]")
    assert said.strip().startswith("2 jobs failed") and "There is no model folder at /nor/here." in said
    assert len(list(tmp_path.rglob("erasure"))) == 1


def test_ctrl_c_stops_the_whole_sweep(told_by, tmp_path, monkeypatch):
    at_call(monkeypatch, UCE, "fit", 2, ctrl_c)
    assert told_by("method=uce", "seed=0,1,2") == "Interrupted. The same command goes on from here."
    assert set(metrics(tmp_path / "runs")) == {"uce/seed0"} and not list(tmp_path.rglob("failed.json"))


def test_a_termination_stops_the_whole_sweep(told_by, tmp_path, monkeypatch):
    draw = Sampler.draw

    def terminated(self, *arguments):
        signal.raise_signal(signal.SIGTERM)  # of which Lightning makes a note
        return draw(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "draw", terminated)
        said = told_by("method=none", "seed=0,1", "sampler.batch_size=1")
    assert said == "Interrupted. The same command goes on from here."
    assert len(list((tmp_path / "store").rglob("*.png"))) == 1 and not list(tmp_path.rglob("failed.json"))


def test_a_reason_is_one_line():
    fault = RuntimeError("Error in call to target 'x':\nTypeError()")
    fault.__cause__ = ValueError("one\ntwo")
    assert reason(fault) == "ValueError: one"
    fault.__cause__ = UserError("Do this.\nOr that.")
    assert reason(fault) == "Do this." and reason(KeyError()) == "KeyError"


# --- doing nothing twice ----------------------------------------------------------------------------------------------


def test_a_sweep_started_again_does_only_what_is_missing(sweep, tmp_path, monkeypatch, loads):
    command = ["method=none,uce", "evaluator=clip_score"]
    sweep(*command)
    assert loads() == 1
    runs = tmp_path / "runs"
    before, measured = files(runs), numbers(runs)
    gone = next(runs.rglob("uce/seed0*/metrics.json"))
    gone.unlink()
    executed = []
    execute = Run.execute
    monkeypatch.setattr(Run, "execute", lambda self, stages: (executed.append(self.folder), execute(self, stages))[1])
    sweep(*command)
    assert executed == [gone.parent] and numbers(runs) == measured
    changed = {p for p, t in files(runs).items() if before.get(p) != t}
    assert {p for p in changed if not p.endswith((".log", "multirun.yaml"))} == {
        p for p in changed if p.startswith(str(gone.parent.relative_to(runs)))
    } - {str((gone.parent / "__main__.log").relative_to(runs))}
    sharing.forget()
    loads()
    sweep(*command)
    assert loads() == 0 and len(executed) == 1


def test_other_evaluators_stages_or_files_are_not_taken_for_done(unlearn, tmp_path, monkeypatch, sd1):
    executed = []
    execute = Run.execute
    monkeypatch.setattr(Run, "execute", lambda self, stages: (executed.append(1), execute(self, stages))[1])

    def times(*overrides: str) -> int:
        executed.clear()
        unlearn("dataset=prompt", *overrides)
        return len(executed)

    assert [times("stages=[fit]"), times("stages=[fit]")] == [1, 0]
    assert [times(), times(), times("stages=[fit]"), times("stages=[report]")] == [1, 0, 0, 0]
    assert [times("evaluator=nudenet"), times("evaluator=nudenet"), times()] == [1, 0, 1]
    assert [times("objective=null"), times("sampler.batch_size=3")] == [0, 1]
    assert times("sampler.batch_size=3") == 0
    os.utime(next(sd1.rglob("*.safetensors")))
    assert times("sampler.batch_size=3") == 1, "a file that a setting names has changed"
    (tmp_path / "run" / "report.html").unlink()
    assert [times("sampler.batch_size=3"), times("sampler.batch_size=3")] == [1, 0]


def in_a_process(arguments: list[str], before: str = "") -> subprocess.Popen:
    """The command line in a process of its own, which first runs the Python of `before`."""
    program = (
        f"{before}\nimport sys\nfrom unlearning.__main__ import main\nsys.argv = {['unlearn', *arguments]!r}\nmain()"
    )
    return subprocess.Popen([sys.executable, "-c", program])


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def held(folder: Path) -> bool:
    """Whether a run is at work in a folder."""
    with (folder / ".lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def within(seconds: float, condition: Callable[[], object]) -> bool:
    """Whether a condition comes to hold in time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return bool(condition())


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_workers_end_with_the_process_that_launched_them(unlearn, tmp_path, how):
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    endless = ["method=none", "seed=0,1,2", "sampler.steps=500", "dataset.images_per_prompt=100"]
    joblib = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"paths.runs={tmp_path}/runs"]
    parent = in_a_process(unlearn.arguments(*FEW, *endless, *joblib))

    def at_work() -> list[Path]:
        return [path.parent for path in (tmp_path / "runs").rglob(".lock") if held(path.parent)]

    begun = within(120, lambda: len(at_work()) == 2)
    parent.send_signal(how)
    assert begun and parent.wait(20) == -how
    assert within(20, lambda: not at_work()), "nobody is at work any more"
    assert len(list((tmp_path / "runs").rglob(".lock"))) == 2, "nor has begun what was queued"


@pytest.mark.parametrize(("owner", "name", "k"), [("Sampler", "draw", 3), ("Run", "report", 2)])
def test_a_sweep_that_was_killed_ends_as_one_that_was_not(unlearn, tmp_path, owner, name, k):
    def command(place: str) -> list[str]:
        return [*FEW, "method=none,uce", "evaluator=clip_score", "sampler.batch_size=1",
                f"paths.runs={tmp_path}/{place}/runs", f"paths.store={tmp_path}/{place}/store"]  # fmt: skip

    def sweep(place: str) -> Path:
        unlearn(*command(place))
        return tmp_path / place

    strike = f"from tests.test_sweeps import *\nat_call(pytest.MonkeyPatch(), {owner}, {name!r}, {k}, killed)"
    assert in_a_process(unlearn.arguments(*command("killed")), strike).wait() == -signal.SIGKILL
    finished = [p.parent for p in (tmp_path / "killed").rglob(".finished")]
    kept = [*(tmp_path / "killed/store").rglob("*.png"), *(folder / "report.html" for folder in finished)]
    before = [path.stat().st_mtime_ns for path in kept]
    assert len(finished) == 1 and len(kept) >= 3
    again, whole = sweep("killed"), sweep("whole")
    assert numbers(again) == numbers(whole) and len(numbers(again)) == 2
    assert [path.stat().st_mtime_ns for path in kept] == before, "nothing is drawn or run again"


def test_two_sweeps_at_once_share_a_store(unlearn, tmp_path):
    command = [*FEW, "method=none,negative_prompt", "dataset.images_per_prompt=9", "evaluator=clip_score"]
    both = [in_a_process(unlearn.arguments(*command, f"paths.runs={tmp_path}/{place}")) for place in "ab"]
    assert [process.wait() for process in both] == [0, 0]
    assert numbers(tmp_path / "a") == numbers(tmp_path / "b") and len(numbers(tmp_path / "a")) == 2
    there = list((tmp_path / "store").rglob("*.png"))
    for picture in there:
        Image.open(picture).verify()
    costs = [json.loads(p.read_text()) for place in "ab" for p in (tmp_path / place).rglob("cost.json")]
    spent = sum(stage["denoiser_evaluations"] for cost in costs for stage in cost.values())
    assert spent == 2 * 2 * len(there) == 2 * 2 * 36, "of two steps, guided: every picture was drawn once"
    assert not list(tmp_path.rglob("*partial*"))


# --- sharing ----------------------------------------------------------------------------------------------------------


def test_jobs_share_the_model_and_leave_what_single_runs_leave(sweep, unlearn, tmp_path, loads):
    train = ["method.iterations=2", "method.steps=2", "method.batch_size=1", "method.trajectory=exact"]
    sweep("method=esd_x", "seed=0,1", *train, "stages=[fit]")
    sweep("method=uce", "seed=0,1", "stages=[fit]")
    assert loads() == 1
    for method, settings in {"esd_x": train, "uce": []}.items():
        sharing.forget()
        alone = unlearn("dataset=prompt", f"method={method}", *settings, "seed=1", "stages=[fit]", run=method)
        [together] = (tmp_path / "runs").rglob(f"{method}/seed1*/erasure/weights.safetensors")
        assert together.read_bytes() == (alone / "erasure" / "weights.safetensors").read_bytes()


def test_memory_never_holds_two_models(monkeypatch):
    class Network:
        def __init__(self):
            self.itself = self  # as networks do

    first = weakref.ref(sharing.shared("model", {"path": "one"}, Network))
    assert sharing.shared("model", {"path": "one"}, lambda: 1 / 0) is first()

    def second():
        assert first() is None
        return Network()

    sharing.shared("model", {"path": "two"}, second)
    assert sharing.shared("other", {}, dict) == {}
    sharing.forget()
    assert sharing.shared("model", {"path": "two"}, lambda: "anew") == "anew"


def test_a_job_that_fails_leaves_nothing_to_share(sweep, told_by, monkeypatch, loads):
    at_call(monkeypatch, UCE, "fit", 1, lambda: 1 / 0)
    told_by("method=uce", "seed=0,1", "stages=[fit]")
    assert loads() == 2


# --- objectives -------------------------------------------------------------------------------------------------------


def test_an_objective_is_what_was_measured():
    measured = {"efficacy/acc_e": 5.0, "retention/acc_s": 90.0, "efficacy/acc_e/protocol": "argmax", "cost/x": math.nan}
    assert objective(None, measured) is None and objective("efficacy/acc_e", measured) == 5.0
    assert objective(["retention/acc_s", "efficacy/acc_e"], measured) == [90.0, 5.0]
    with pytest.raises(UserError, match="Did you mean efficacy/acc_e"):
        objective(["efficacy/ace_e"], measured)
    with pytest.raises(UserError, match="no sweeper can learn"):
        objective("cost/x", measured)


def test_a_mistyped_objective_is_told_before_a_model_is_loaded(told, loads):
    said = told("evaluator=accuracy", "objective=[efficacy/acc_e,retention/ac_s]")
    assert "'retention/ac_s' is no metric of this run. Did you mean retention/acc_s" in said and loads() == 0


@pytest.fixture
def study(sweep, tmp_path):
    """study() -> the stored study, after the command that searches for UCE's lamb has ended, or was interrupted."""
    optuna = pytest.importorskip("optuna")

    def call(*overrides: str, trials: int = 4) -> "optuna.Study":
        search = ["hydra/sweeper=study", "method=uce", "method.lamb=interval(0.1,1)", "evaluator=clip_score"]
        search += ["objective=[efficacy/clip_score_e,fidelity/clip_score]"]
        sweep(*search, "hydra.sweeper.direction=[minimize,maximize]", f"hydra.sweeper.n_trials={trials}", *overrides)
        return stored()

    def stored() -> "optuna.Study":
        [summary] = optuna.get_all_study_summaries(f"sqlite:///{tmp_path}/runs/studies.db")
        return optuna.load_study(summary.study_name, f"sqlite:///{tmp_path}/runs/studies.db")

    call.stored = stored
    return call


def test_a_study_that_was_interrupted_goes_on_to_its_number_of_trials(study, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at_call(patch, UCE, "fit", 3, ctrl_c)
        with pytest.raises(SystemExit, match="Interrupted"):
            study()
    interrupted = study.stored().trials
    assert [trial.state.name for trial in interrupted] == ["COMPLETE", "COMPLETE", "RUNNING"]
    trials = study().trials
    assert [trial.state.name for trial in trials] == ["COMPLETE", "COMPLETE", "RUNNING", "COMPLETE", "COMPLETE"]
    assert trials[3].params == interrupted[2].params, "what was interrupted is made first"
    assert all(len(trial.values) == 2 for trial in trials if trial.state.name == "COMPLETE")
    assert len(study().trials) == 5, "and is not made again"
    assert len(metrics(tmp_path / "runs")) == 1 and len(list(tmp_path.rglob("metrics.json"))) == 4


def test_a_search_for_something_else_is_another_study(sweep, tmp_path):
    optuna = pytest.importorskip("optuna")

    def trials(*overrides: str, lamb: str = "interval(0.1,1)", objective: str = "efficacy/clip_score_e") -> list[int]:
        search = ["method=uce", f"method.lamb={lamb}", f"objective={objective}", "evaluator=clip_score"]
        sweep("hydra/sweeper=study", "hydra.sweeper.n_trials=1", *search, *overrides)
        studies = optuna.get_all_study_summaries(f"sqlite:///{tmp_path}/runs/studies.db")
        assert all(study.study_name.startswith("uce of cat on emoji_unet ") for study in studies)
        return sorted(study.n_trials for study in studies)

    assert [trials(), trials("logger=csv")] == [[1], [1]]
    assert trials(objective="fidelity/clip_score") == [1, 1]
    assert trials(lamb="interval(0.1,2)") == [1, 1, 1]
    assert trials("seed=1") == [1, 1, 1, 1]
    assert trials("hydra.sweeper.n_trials=2") == [1, 1, 1, 2]


def test_a_job_that_fails_fails_its_trial(study, tmp_path, monkeypatch):
    at_call(monkeypatch, UCE, "fit", 1, lambda: 1 / 0)
    with pytest.raises(SystemExit) as caught:
        study(trials=2)
    assert "1 job failed" in caught.value.code and "division by zero" in caught.value.code
    assert [(trial.state.name, trial.values is None) for trial in study.stored().trials] == [
        ("FAIL", True), ("COMPLETE", False)
    ]  # fmt: skip


# --- launchers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "ray"])
def test_a_launcher_runs_jobs_in_processes_of_their_own(sd1, tmp_path, launcher):
    """One of two jobs fails, and is told of by the process that launched them."""
    plugin = f"hydra_plugins.hydra_{launcher.removesuffix('_local')}_launcher"
    pytest.importorskip(plugin, reason=f"{plugin} is not installed: pip install 'unlearning[sweeps,ray]'")
    command = [sys.executable, "-m", "unlearning", "-m", f"hydra/launcher={launcher}", "concept=cat,kat"]
    command += ["method=uce", "stages=[fit]", "evaluator=[]", "logger=none", f"model.path={sd1}"]
    command += ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=tmp_path)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "1 job failed" in done.stderr and "No object is named 'kat'. Did you mean cat" in done.stderr
    assert "Traceback" not in done.stderr
    assert [p.parent.parent.parent.name for p in tmp_path.rglob("erasure")] == ["cat"]
    assert [p.parent.parent.parent.name for p in tmp_path.rglob("failed.json")] == ["kat"]


# --- sweeps of W&B's agents, made of overrides that Hydra understands -------------------------------------------------


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


def test_what_it_maximises_is_measured():
    assert Accuracy.higher_is_better[SWEEP["metric"]["name"]] == (SWEEP["metric"]["goal"] == "maximize")


def test_the_agent_calls_the_command_line():
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    arguments = create_sweep_command_args({"args": {"method.eta": {"value": 2.0}, "concept": {"value": "cat"}}})
    assert arguments["args_no_hyphens"] == ["method.eta=2.0", "concept=cat"]
    assert SWEEP["command"] == ["${env}", "${program}", "${args_no_hyphens}"] and SWEEP["program"] == "unlearn"

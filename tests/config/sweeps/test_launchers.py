"""Jobs run in separate processes, which end together with the launching process."""

import fcntl
import os
import signal
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf

from tests.config.sweeps.commands import in_a_process
from tests.processes import Started
from unlearning.config import sweeps


@pytest.mark.parametrize("launcher", ["joblib", "submitit_local", "ray"])
def test_a_launcher_runs_jobs_in_processes_of_their_own(unlearn, tmp_path, launcher):
    """One of two jobs fails, and the process that launched them reports it."""
    plugin = f"hydra_plugins.hydra_{launcher.removesuffix('_local')}_launcher"
    pytest.importorskip(plugin, reason=f"{plugin} is not installed: pip install 'concept-unlearning[sweeps,ray]'")
    jobs = ["concept=cat,kat", "method=uce", "stages=[fit]", f"paths.runs={tmp_path}/runs"]
    try:
        with pytest.raises(SystemExit) as caught:
            unlearn("-m", f"hydra/launcher={launcher}", *jobs)
    finally:
        if launcher == "ray":
            import_module("ray").shutdown()  # its processes, and its handlers of signals
        if launcher == "joblib":
            import_module("joblib.externals.loky").get_reusable_executor().shutdown(kill_workers=True)
    message = str(caught.value)
    assert "1 job failed" in message and "'kat'. Did you mean cat" in message and "Traceback" not in message
    assert [p.parent.parent.parent.name for p in tmp_path.rglob("erasure")] == ["cat"]
    assert [p.parent.parent.parent.name for p in tmp_path.rglob("failed.json")] == ["kat"]


@pytest.mark.parametrize(
    ("name", "visible", "sees"),
    [("LokyProcess-1", None, "0"), ("LokyProcess-2", None, "1"), ("LokyProcess-4", None, "0"),
     ("LokyProcess-2", "2,5", "5"), ("LokyProcess-2", "7", "7"), ("MainProcess", None, None)],
)  # fmt: skip
def test_each_worker_sees_a_gpu_of_its_own(monkeypatch, name, visible, sees):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 3)
    monkeypatch.setattr("multiprocessing.parent_process", lambda: name != "MainProcess" or None)
    monkeypatch.setattr("multiprocessing.current_process", lambda: SimpleNamespace(name=name))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("unlearning.config.sweeps._end_with_parent", lambda: None)
    sweeps._take_one_gpu.cache_clear()
    sweeps.Failures().on_job_start(OmegaConf.create({"trainer": {"devices": 1}}))
    assert os.environ.get("CUDA_VISIBLE_DEVICES") == sees


def test_a_job_that_trains_on_several_gpus_sees_them_all(monkeypatch):
    monkeypatch.setattr("unlearning.config.sweeps._take_one_gpu", None)  # calling it would be an error
    monkeypatch.setattr("unlearning.config.sweeps._end_with_parent", lambda: None)
    sweeps.Failures().on_job_start(OmegaConf.create({"trainer": {"devices": -1}}))


def held(folder: Path) -> bool:
    """Whether a run is at work in a folder."""
    with (folder / ".lock").open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False


def within(seconds: float, condition: Callable[[], object]) -> bool:
    """Whether a condition becomes true in time."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.1)
    return bool(condition())


def at_work(folder: Path) -> list[Path]:
    """The folders of the runs that are at work below a folder."""
    return [path.parent for path in folder.rglob(".lock") if held(path.parent)]


def work_for_ever(folder: str, job: int) -> None:
    """A job that begins like one of a sweep and never ends."""
    sweeps.Failures().on_job_start(OmegaConf.create({"trainer": {"devices": -1}}))
    own = Path(folder, str(job))
    own.mkdir()
    with (own / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        time.sleep(600)


THREE_JOBS = """
import sys
from joblib import Parallel, delayed
from tests.config.sweeps.test_launchers import work_for_ever

Parallel(n_jobs=2)(delayed(work_for_ever)(sys.argv[1], job) for job in range(3))
"""


def test_workers_end_with_the_process_that_launched_them(tmp_path):
    parent = Started(THREE_JOBS, [tmp_path])
    assert within(120, lambda: len(at_work(tmp_path)) == 2)
    parent.send_signal(signal.SIGKILL)  # which leaves it no time to end them
    assert parent.wait(20) == -signal.SIGKILL
    assert within(20, lambda: not at_work(tmp_path)), "nobody is at work any more"
    assert len(list(tmp_path.rglob(".lock"))) == 2, "nor has begun what was queued"


def test_a_killed_worker_ends_the_sweep_with_advice_and_the_failures(unlearn, tmp_path):
    """Two workers have begun jobs that never end, after one that failed. A fourth job is queued."""
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher")
    endless = ["-m", "concept=kat,cat,dog,key", "sampler.steps=500", "dataset.images_per_prompt=100"]
    joblib = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2", f"paths.runs={tmp_path}/runs"]
    parent = in_a_process(unlearn.arguments(*endless, *joblib))
    assert within(120, lambda: len(at_work(tmp_path / "runs")) == 2)
    children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text().split()
    workers = [pid for pid in children if "popen_loky" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(workers) == 2
    os.kill(int(workers[0]), signal.SIGKILL)
    assert parent.wait(30) == 1 and within(20, lambda: not at_work(tmp_path / "runs"))
    message = parent.stderr
    assert "hydra.launcher.n_jobs=1" in message and "The same command goes on from here." in message
    assert "1 job failed" in message and "'kat'. Did you mean cat" in message and "Traceback" not in message

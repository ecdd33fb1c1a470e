"""Sweeps of a tiny model, and their error messages."""

from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus

from tests.config.sweeps.commands import FEW


@pytest.fixture
def sweep(unlearn, tmp_path):
    """sweep(*overrides) -> the folder of all runs."""

    def call(*overrides: str) -> Path:
        unlearn(*FEW, f"paths.runs={tmp_path}/runs", *overrides)
        return tmp_path / "runs"

    return call


@pytest.fixture
def error_of(sweep):
    """error_of(*overrides) -> the message at the end of a sweep in which a job fails."""

    def call(*overrides: str) -> str:
        with pytest.raises(SystemExit) as caught:
            sweep(*overrides)
        return caught.value.code

    return call


@pytest.fixture
def loads(monkeypatch):
    """loads() -> how often a model was loaded since the last call."""
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


@pytest.fixture
def batches(monkeypatch):
    """The launched batches of jobs; each job only returns its `seed`."""
    launched = []

    def launch(self, job_overrides, initial_job_idx):
        jobs = [dict(override.split("=", 1) for override in job) for job in job_overrides]
        launched.append(jobs)
        return [JobReturn(status=JobStatus.COMPLETED, _return_value=float(job.get("seed", 0))) for job in jobs]

    launchers = Plugins.instance().class_name_to_class
    monkeypatch.setattr(launchers["hydra._internal.core_plugins.basic_launcher.BasicLauncher"], "launch", launch)
    return launched

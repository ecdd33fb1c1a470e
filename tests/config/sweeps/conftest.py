"""Sweeps of a tiny model, and what they say."""

from pathlib import Path

import pytest
from diffusers import StableDiffusionPipeline

from tests.config.sweeps.commands import FEW


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

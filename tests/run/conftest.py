"""Fixtures for tests of whole runs."""

import shutil

import pytest
from diffusers import UNet2DConditionModel


@pytest.fixture
def evaluations(monkeypatch):
    """How many latents have gone through the denoiser: `count()` since the last `count()`."""
    seen = [0]
    forward = UNet2DConditionModel.forward

    def counted(self, sample, *arguments, **keywords):
        seen[0] += len(sample)
        return forward(self, sample, *arguments, **keywords)

    monkeypatch.setattr(UNet2DConditionModel, "forward", counted)

    def count() -> int:
        new, seen[0] = seen[0], 0
        return new

    return count


@pytest.fixture
def model(tmp_path, sd1):
    """A copy of the tiny model that a test may change."""
    return shutil.copytree(sd1, tmp_path / "model")

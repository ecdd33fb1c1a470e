"""One torch thread a process, no network, no dashboards: before anything heavy is imported."""

import os

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline", "WANDB_SILENT": "true"}

import pytest
import torch

torch.set_num_threads(1)

from tests import tiny  # noqa: E402


@pytest.fixture(scope="session", params=["sd1", "sd2", "sdxl"])
def any_pipeline(request, tmp_path_factory):
    """(family, folder) of a tiny random pipeline of every family, saved as diffusers saves."""
    return request.param, tiny.save(request.param, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="session")
def sd1(tmp_path_factory):
    """The folder of a tiny random Stable Diffusion 1.x."""
    return tiny.save("sd1", tmp_path_factory.mktemp("models"))

"""The embedded model, and drawings of rabbits to find words for."""

from pathlib import Path

import numpy as np
import pytest
import torch

import unlearning
from unlearning.data.objects import emoji_objects
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.training.forget_retain import encoded


@pytest.fixture(scope="module")
def embedded():
    return StableDiffusion.load(str(Path(unlearning.__file__).parent / "weights" / "emoji_unet"), device="cpu")


@pytest.fixture(scope="module")
def rabbits(embedded):
    """(task, forget, retain, M) of a dozen images of each kind, with true masks."""
    torch.manual_seed(0)
    task = emoji_objects("rabbit", pictures=12)
    forget, retain = (encoded(embedded, images) for images in (task.forget_images, task.retain_images))
    true = torch.from_numpy(np.stack([picture.masks[0] for picture in task.forget_images.pictures])).float()
    return task, forget, retain, torch.nn.functional.avg_pool2d(true[:, None], 4)

"""Training an erased model further: the diffusion loss on captioned images, and how a concept is relearned."""

from functools import partial

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from unlearning.concepts import Concept, UnlearningTask
from unlearning.errors import UserError
from unlearning.methods.finetune import FineTuning
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.denoising import noised
from unlearning.training.student import Weights

IMAGES = list(np.random.default_rng(0).integers(0, 255, (4, 16, 16, 3), dtype=np.uint8))
TASK = UnlearningTask((Concept("cat"),), forget_images=IMAGES[:3], retain_images=IMAGES[1:],
                      retain_captions=lambda: ["a dog", "a ship", "the sky"])  # fmt: skip


@pytest.fixture(scope="module")
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


def training(*, images="forget", iterations=1, lr=1e-3, count=None, optimizer=torch.optim.SGD, parameters="attn2"):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return FineTuning(
        images=images,
        count=count,
        student=Weights(parameters),
        iterations=iterations,
        batch_size=3,
        optimizer=partial(optimizer, lr=lr),
        trainer=partial(pl.Trainer, enable_model_summary=False, **quiet),
    )


def test_a_step_descends_the_diffusion_loss_of_the_images_under_their_captions(model, monkeypatch):
    seen = []
    encode = type(model).encode_prompts
    monkeypatch.setattr(type(model), "encode_prompts", lambda m, text: seen.append(list(text)) or encode(m, text))
    training(images="retain").fit(model, TASK)
    assert sorted(seen[0]) == ["a dog", "a ship", "the sky"], "every image once, under its own caption"
    seen.clear()
    training().fit(model, TASK)
    assert seen == [["a photo of the cat"] * 3]


def test_relearning_brings_the_images_nearer(model):
    def error() -> float:
        torch.manual_seed(5)
        z_0 = model.encode_images(torch.tensor(np.stack(IMAGES[:3])).permute(0, 3, 1, 2) / 255)
        z_0 = z_0[torch.randint(len(z_0), (64,))]
        z_t, t = noised(model, z_0)
        with torch.no_grad():
            c = model.encode_prompts(["a photo of the cat"]).expand(64)
            return float((model.predict(z_t, t, c) - model.to_prediction(z_0, z_t, t)).square().mean())

    before = error()
    with (
        training(iterations=20, lr=1e-2, optimizer=torch.optim.Adam, parameters=r"^unet\.")
        .fit(model, TASK)
        .applied_to(model)
    ):
        assert error() < 0.97 * before
    assert error() == before


def test_count_limits_the_training_images(model):
    few = training(count=1).fit(model, TASK)
    one = UnlearningTask((Concept("cat"),), forget_images=IMAGES[:1])
    assert few.digest == training().fit(model, one).digest


@pytest.mark.parametrize(
    ("images", "task", "answer"),
    [
        ("retain", UnlearningTask((Concept("cat"),), retain_images=IMAGES), r"captions.*\.txt"),
        ("forget", UnlearningTask((Concept("cat"),)), "no forget images"),
        ("forget", UnlearningTask((Concept("cat"), Concept("dog")), forget_images=IMAGES), "one concept at a time"),
    ],
)
def test_data_that_cannot_be_trained_on_are_refused(model, images, task, answer):
    with pytest.raises(UserError, match=answer):
        training(images=images).fit(model, task)

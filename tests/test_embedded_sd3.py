"""emoji_sd3, as shipped: small, loads in plain diffusers with the same images as ours, and follows prompts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from hydra.utils import instantiate

from tests.composed import config
from unlearning.data.openmoji import CIFAR10
from unlearning.judges.emoji import EmojiJudge

WEIGHTS = Path(__file__).parents[1] / "unlearning" / "weights"
FOLDER = WEIGHTS / "emoji_sd3"


@pytest.fixture
def cfg(tmp_path):
    return config(tmp_path, "model=emoji_sd3")


def test_it_is_small_and_holds_no_pickle():
    files = [p for p in FOLDER.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 14e6
    assert {p.suffix for p in files} <= {".json", ".safetensors", ".txt", ".model"}


def test_it_draws_what_is_asked_for(cfg):
    cfg.sampler.steps, prompts = 10, [f"a photo of the {name}" for name in CIFAR10]
    images = instantiate(cfg.sampler)(instantiate(cfg.model), prompts, range(len(prompts)))
    judge = EmojiJudge(WEIGHTS / "judge" / "classifier")
    names, probabilities = judge((255 * images).round().byte().permute(0, 2, 3, 1), "object")
    assert np.mean([names[i] == name for i, name in zip(probabilities.argmax(1), CIFAR10, strict=True)]) >= 0.9


def test_our_sampler_draws_what_plain_diffusers_draws(cfg):
    cfg.sampler.steps, prompts = 4, ["a photo of the cat", "a ship image in neon style"]
    ours = instantiate(cfg.sampler)(instantiate(cfg.model), prompts, [3, 4])
    theirs = StableDiffusion3Pipeline.from_pretrained(FOLDER)(
        prompts, num_inference_steps=4, guidance_scale=cfg.sampler.guidance_scale, max_sequence_length=24,
        generator=[torch.Generator().manual_seed(seed) for seed in (3, 4)], output_type="pt",
    ).images  # fmt: skip
    torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)

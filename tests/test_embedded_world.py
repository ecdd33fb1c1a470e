"""The embedded models, as shipped: they load in plain diffusers, follow prompts, and can be erased."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image

from tests import processes
from tests.composed import config
from unlearning.__main__ import run
from unlearning.data import openmoji
from unlearning.data.captioning import with_article
from unlearning.data.openmoji import CIFAR10, OBJECTS, STYLES
from unlearning.judges.emoji import EmojiJudge
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.sampler import Sampler

WEIGHTS = Path(__file__).parents[1] / "unlearning" / "weights"

STOCK = """
import sys
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
base, erasure, out = sys.argv[1:]
pipe = StableDiffusionPipeline.from_pretrained(base)

def draw(when):
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    images = pipe(["a photo of the cat"] * 2, num_inference_steps=10, generator=generators).images
    for i, image in enumerate(images):
        image.save(f"{out}/{when}{i}.png")

draw("before")
weights = {k.removeprefix("unet."): v for k, v in load_file(erasure + "/weights.safetensors").items()}
missing, unexpected = pipe.unet.load_state_dict(weights, strict=False)
assert not unexpected
draw("after")
assert "unlearning" not in sys.modules
"""


def megabytes(folder: Path) -> float:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6


@pytest.fixture(scope="module")
def judge():
    return EmojiJudge(WEIGHTS / "judge" / "classifier")


@pytest.fixture(scope="module")
def model():
    return StableDiffusion.load(str(WEIGHTS / "emoji_unet"), device="cpu")


@pytest.fixture(scope="module")
def erased(tmp_path_factory):
    """The folder and the numbers of the demo's run, uce on cat, with a tenth of its images."""
    folder = tmp_path_factory.mktemp("demo")
    few = ("sampler.steps=10", "dataset.images_per_prompt=1", "evaluator.fid.count=100")
    return folder / "run", run(config(folder, "concept=cat", "method=uce", "stages=[fit,generate,evaluate]", *few))


def seen(judge, images: np.ndarray, question: str = "object") -> list[str]:
    names, probabilities = judge(torch.from_numpy(images), question)
    return [names[i] for i in probabilities.argmax(1).tolist()]


def generated(model, prompts) -> np.ndarray:
    images = Sampler(steps=10, batch_size=20)(model, prompts, range(len(prompts)))
    return (images * 255).round().byte().permute(0, 2, 3, 1).numpy()


def test_they_are_small_and_hold_no_pickle():
    assert megabytes(WEIGHTS / "emoji_unet") <= 26
    assert megabytes(WEIGHTS / "judge") <= 4
    assert not [p for p in WEIGHTS.rglob("*") if p.suffix in (".bin", ".ckpt", ".pt", ".pth", ".pkl")]


def test_the_judge_recognises_held_out_drawings(judge):
    rngs = [openmoji.rng_of("eval", 1, i) for i in range(120)]
    asked = [(list(OBJECTS)[i % len(OBJECTS)], list(STYLES)[i % len(STYLES)]) for i in range(120)]
    images = np.stack([openmoji.picture(n, s, rng).image for (n, s), rng in zip(asked, rngs, strict=True)])
    assert np.mean([a == b for a, (b, _) in zip(seen(judge, images), asked, strict=True)]) >= 0.99
    assert np.mean([a == b for a, (_, b) in zip(seen(judge, images, "style"), asked, strict=True)]) >= 0.99


def test_the_judge_recognises_no_object_in_empty_images(judge):
    images = np.stack([openmoji.unrecognisable(openmoji.rng_of("eval", 1, i)) for i in range(50)])
    assert np.mean([name == "nothing" for name in seen(judge, images)]) >= 0.99


def test_the_autoencoder_keeps_a_drawing(model):
    images = np.stack([openmoji.sample("eval", 2, i).image for i in range(16)])
    x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    error = (model.decode(model.encode_images(x)) - x).pow(2).mean((1, 2, 3))
    assert (-10 * error.log10()).mean() >= 24


def test_it_draws_the_ten_classes(model, judge):
    images = generated(model, [f"a photo of the {name}" for name in CIFAR10])
    assert np.mean([a == b for a, b in zip(seen(judge, images), CIFAR10, strict=True)]) >= 0.9


def test_it_draws_in_the_style_asked_for(model, judge):
    asked = list(STYLES)
    images = generated(model, [with_article(f"a dog image in {style} style") for style in asked])
    assert np.mean([a == b for a, b in zip(seen(judge, images, "style"), asked, strict=True)]) >= 0.85


def test_the_demo_erases_the_cat(erased):
    _, metrics = erased
    assert metrics["base/efficacy/acc_e"] >= 90
    assert metrics["efficacy/acc_e"] <= 10
    assert metrics["efficacy/acc_g"] <= 15


def test_the_demo_retains_other_objects(erased):
    _, metrics = erased
    assert metrics["retention/acc_s"] >= 0.7 * metrics["base/retention/acc_s"]


def test_the_demos_metrics_are_there_with_their_protocols(erased):
    folder, metrics = erased
    assert json.loads((folder / "metrics.json").read_text()) == metrics
    for name in ("efficacy/acc_e", "fidelity/fid", "fidelity/clip_score", "summary/h_o"):
        assert isinstance(metrics[name], float) and metrics[f"{name}/protocol"]
    for name in ("seconds", "peak_memory", "artefact_bytes"):
        assert metrics[f"cost/{name}"] > 0


def test_stock_diffusers_draws_the_cat_before_and_not_after(erased, judge, tmp_path):
    processes.run(STOCK, [WEIGHTS / "emoji_unet", erased[0] / "erasure", tmp_path], cwd=tmp_path)

    def share(when: str) -> float:
        images = np.stack([np.asarray(Image.open(tmp_path / f"{when}{i}.png").convert("RGB")) for i in range(2)])
        return np.mean([name == "cat" for name in seen(judge, images)])

    assert share("before") == 1
    assert share("after") == 0


def test_styles_can_be_evaluated(tmp_path):
    few = ["sampler.steps=2", "dataset.images_per_prompt=1", "+dataset.objects=[cat]", "evaluator=[accuracy]"]
    stages = "stages=[fit,generate,evaluate]"
    metrics = run(config(tmp_path, "dataset=emoji_styles", "concept=neon", "method=none", stages, *few))
    assert {"efficacy/ua", "retention/ira", "retention/cra"} <= metrics.keys()
    task = instantiate(config(tmp_path, "dataset=emoji_styles", "concept=neon").dataset)
    assert len(task.prompts) == len(STYLES) * len(CIFAR10)

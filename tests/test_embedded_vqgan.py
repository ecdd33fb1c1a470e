"""emoji_vqgan, as shipped: small, loads in plain diffusers, reconstructs recognisable scenes, and can be erased."""

from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import VQModel
from hydra.utils import instantiate

from tests.composed import config
from unlearning.__main__ import run
from unlearning.data.regions import with_regions
from unlearning.data.scenes import emoji_scenes
from unlearning.judges.emoji import EmojiJudge
from unlearning.models.vqgan import VQGAN
from unlearning.sampling.reconstruction import as_tensor
from unlearning.store.manifest import ManifestRow

WEIGHTS = Path(__file__).parents[1] / "unlearning" / "weights"
FOLDER = WEIGHTS / "emoji_vqgan"


@pytest.fixture(scope="module")
def scenes():
    """(object images cut out of scenes, the same from the reconstructions, their classes, codes)."""
    inputs = emoji_scenes("cat", images=20, pictures=1).inputs
    pictures = np.stack([i.read() for i in inputs])
    model = VQGAN.load(str(FOLDER), device="cpu")
    codes = model.encode(as_tensor(pictures))
    again = (model.decode(codes) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    rows = [ManifestRow(Path(), i.name, i.role, {}, 0, regions=i.regions) for i in inputs]
    (before, used), (after, _) = with_regions(pictures, rows), with_regions(again, rows)
    return before, after, [r.labels["object"] for r in used], codes


def test_it_is_small_and_plain_diffusers_loads_it():
    assert sum(p.stat().st_size for p in FOLDER.iterdir()) < 4e6
    vq = VQModel.from_pretrained(FOLDER)
    assert vq.config.num_vq_embeddings == 2048 and vq.config.sample_size == 64


def test_the_judge_recognises_the_reconstructed_objects(scenes):
    before, after, shown, _ = scenes
    judge = EmojiJudge(WEIGHTS / "judge" / "classifier")

    def right(pictures) -> np.ndarray:
        names, probabilities = judge(torch.as_tensor(pictures), "object")
        return np.array([names[i] == name for i, name in zip(probabilities.argmax(1), shown, strict=True)])

    was, is_ = right(before), right(after)
    assert was.mean() > 0.95 and is_[was].mean() > 0.9


def test_codes_do_not_depend_on_the_batch_and_equal_diffusers():
    pictures = as_tensor(np.stack([i.read() for i in emoji_scenes("cat", images=8, pictures=1).inputs]))
    vq = VQModel.from_pretrained(FOLDER).eval()
    with torch.no_grad():
        alone = [vq.quantize(vq.encode(2 * p.contiguous() - 1).latents)[2][2] for p in pictures.split(1)]
    model = VQGAN.load(str(FOLDER), device="cpu")
    for size in (16, 5):
        codes = torch.cat([model.encode(some) for some in pictures.split(size)])
        assert torch.equal(codes.flatten(), torch.cat(alone))


def test_its_codebook_is_in_use(scenes):
    assert len(scenes[-1].unique()) > 0.6 * 2048, "of 40 scenes; experiments/openmoji/measure_vqgan.py has a thousand"


def test_replacement_erases_the_concept_and_keeps_other_objects(tmp_path):
    """The claim of latent code replacement, on twelve scenes; experiments/lcr has the table."""
    chosen = ["model=emoji_vqgan", "method=lcr_localized", "detector@method.detector=boxes", "concept=ship"]
    small = ["dataset.images=12", "dataset.pictures=100", "stages=[fit,generate,evaluate]", "evaluator=[accuracy]"]
    numbers = run(config(tmp_path, *chosen, *small))
    assert numbers["base/efficacy/acc_e"] > 60
    assert numbers["efficacy/acc_e"] <= 0.1 * numbers["base/efficacy/acc_e"]
    assert numbers["retention/acc_s"] >= 0.9 * numbers["base/retention/acc_s"]
    assert instantiate(config(tmp_path, *chosen).model).network.config.num_vq_embeddings == 2048

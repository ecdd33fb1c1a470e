"""The judge as a classifier and as a feature extractor, with random weights."""

import re
import shutil

import numpy as np
import pytest
import torch

from tests import tiny
from unlearning.concepts import ERASE, RETAIN
from unlearning.errors import UserError
from unlearning.evaluators.accuracy import Accuracy
from unlearning.judges.emoji import NOTHING, EmojiJudge, Judge, JudgeFeatures
from unlearning.store.manifest import ManifestRow


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("judge")
    Judge(["cat", "dog"], ["color", "neon"], channels=(4, 8), size=16).to(torch.float16).save_pretrained(path)
    return path


@pytest.fixture
def images():
    return torch.randint(0, 256, (3, 20, 24, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_answers_are_probabilities_over_names(path, images):
    judge = EmojiJudge(path)
    objects, p = judge(images, "object")
    assert objects == ("cat", "dog", NOTHING) and p.shape == (3, 3)
    assert torch.allclose(p.sum(1), torch.ones(3))
    styles, p = judge(images, "style")
    assert styles == ("color", "neon") and p.shape == (3, 2)
    with pytest.raises(UserError, match="Did you mean style"):
        judge(images, "styles")


def test_answers_are_the_outputs_of_the_network(path, images):
    network = Judge.from_pretrained(path, torch_dtype=torch.float32).eval()
    expected = network(images.permute(0, 3, 1, 2) / 255)
    assert torch.allclose(EmojiJudge(path)(images, "object")[1], expected.objects.softmax(1))
    assert torch.allclose(JudgeFeatures(path)(images), expected.features)


def test_a_batch_changes_no_feature(path, images):
    features = JudgeFeatures(path)
    assert features(images).shape == (3, 8)
    assert torch.allclose(features(images)[1:2], features(images[1:2]), atol=1e-6), "batch statistics are used"


def test_the_name_identifies_the_weights(path, tmp_path):
    Judge(["cat", "dog"], ["color", "neon"], channels=(4, 8), size=16).save_pretrained(tmp_path)
    assert EmojiJudge(path).name == EmojiJudge(path).name != EmojiJudge(tmp_path).name


def test_accuracy_uses_the_judge(path, images):
    metric = Accuracy(EmojiJudge(path), score="argmax")
    names, p = EmojiJudge(path)(images, "object")
    best = names[p[0].argmax()]
    metric.update(
        images.numpy(), [ManifestRow(path, "", role, {"object": best}, 0) for role in (ERASE, RETAIN, RETAIN)]
    )
    assert metric.compute()["efficacy/acc_e"] == 100
    assert EmojiJudge(path).name in metric.protocol


@pytest.mark.parametrize("kind", [EmojiJudge, JudgeFeatures])
def test_missing_weights_name_the_setting(kind, tmp_path):
    with pytest.raises(UserError, match=r"paths\.weights"):
        kind(tmp_path / "none")


def test_a_judge_that_lacks_a_weight_is_refused(path, tmp_path):
    folder = shutil.copytree(path, tmp_path / "judge")
    name = tiny.lose_a_weight(folder / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=re.escape(name)):
        EmojiJudge(folder)


def test_images_may_be_arrays(path, images):
    assert np.allclose(JudgeFeatures(path)(images.numpy()), JudgeFeatures(path)(images))

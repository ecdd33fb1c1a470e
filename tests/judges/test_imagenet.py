"""torchvision's ResNet-50 with random weights, as a classifier of Imagenette's classes."""

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image
from torchvision.models import ResNet50_Weights, resnet50

from tests.composed import config
from unlearning.data.imagenette import CLASSES
from unlearning.errors import UserError
from unlearning.judges.imagenet import ResNet50


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("hub") / "checkpoints" / "resnet50-11ad3fa6.pth"
    path.parent.mkdir()
    torch.save(resnet50().state_dict(), path)
    return path


def test_probabilities_are_torchvisions_and_include_every_class_of_imagenette(weights, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(weights.parents[1]))
    images = np.random.default_rng(0).integers(0, 256, (2, 300, 280, 3), dtype=np.uint8)
    judge = ResNet50()
    names, probabilities = judge(torch.as_tensor(images), "object")
    network = resnet50()
    network.load_state_dict(torch.load(weights, weights_only=True))
    preprocess = ResNet50_Weights.IMAGENET1K_V2.transforms()
    with torch.no_grad():
        expected = network.eval()(torch.stack([preprocess(Image.fromarray(image)) for image in images])).softmax(1)
    assert torch.allclose(probabilities, expected, atol=1e-6)
    assert len(names) == 1000
    assert [names.index(name) for name in CLASSES] == [0, 217, 482, 491, 497, 566, 569, 571, 574, 701]
    assert "ResNet-50" in judge.name and "IMAGENET1K_V2" in judge.name
    with pytest.raises(UserError, match="object"):
        judge(torch.as_tensor(images), "style")


def test_missing_or_foreign_weights_name_the_file_to_get(tmp_path, weights):
    with pytest.raises(
        UserError, match=r"download\.pytorch\.org/models/resnet50-11ad3fa6\.pth.*judge\.classifier\.path"
    ):
        ResNet50(tmp_path / "none.pth")
    torch.save({"fc.weight": torch.zeros(1)}, tmp_path / "other.pth")
    (tmp_path / "broken.pth").write_bytes(b"none")
    for name in ("other.pth", "broken.pth"):
        with pytest.raises(UserError, match=name):
            ResNet50(tmp_path / name)
    with pytest.raises(UserError, match="Did you mean IMAGENET1K_V1"):
        ResNet50(weights, "IMAGENET_V1")


def test_the_judge_composes(tmp_path, weights):
    settings = config(tmp_path, "judge=imagenet", "evaluator=accuracy", f"judge.classifier.path={weights}")
    assert "argmax of ResNet-50" in instantiate(settings.evaluator.accuracy).protocol

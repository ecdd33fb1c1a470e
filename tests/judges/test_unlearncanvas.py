"""UnlearnCanvas' classifiers, compared with a small ViT that has timm's parameter names."""

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image
from torch import nn

from tests.composed import config
from unlearning.__main__ import CONF
from unlearning.data.unlearncanvas import OBJECTS, STYLES
from unlearning.errors import UserError
from unlearning.judges.unlearncanvas import UnlearnCanvasClassifiers

WIDTH, HEADS = 128, 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = nn.Module(), nn.Module()
        self.attn.qkv, self.attn.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp.fc1, self.mlp.fc2 = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.attn.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / (WIDTH // HEADS) ** 0.5).softmax(-1)
        x = x + self.attn.proj((weights @ v).transpose(1, 2).flatten(2))
        return x + self.mlp.fc2(nn.functional.gelu(self.mlp.fc1(self.norm2(x))))


class ViT(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, 14 * 14 + 1, WIDTH))
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(3, WIDTH, 16, 16)
        self.blocks = nn.Sequential(Block(), Block())
        self.norm, self.head = nn.LayerNorm(WIDTH, eps=1e-6), nn.Linear(WIDTH, classes)

    def forward(self, x):
        x = self.patch_embed.proj(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """({question: network}, {question: path of its checkpoint})."""
    torch.manual_seed(0)
    folder, networks, paths = tmp_path_factory.mktemp("canvas"), {}, {}
    for question, classes in (("style", 51), ("object", 20)):
        networks[question], paths[question] = ViT(classes).eval(), folder / f"{question}.pth"
        torch.save({"model_state_dict": networks[question].state_dict(), "epoch": 9}, paths[question])
    return networks, paths


def test_probabilities_are_the_outputs_of_the_networks(trained):
    networks, paths = trained
    classifiers = UnlearnCanvasClassifiers(**paths)
    images = np.random.default_rng(0).integers(0, 256, (3, 300, 260, 3), dtype=np.uint8)
    small = np.stack([np.asarray(Image.fromarray(i).resize((224, 224), Image.Resampling.BILINEAR)) for i in images])
    pixels = torch.tensor(small).permute(0, 3, 1, 2) / 127.5 - 1
    for question, network in networks.items():
        names, probabilities = classifiers(torch.as_tensor(images), question)
        with torch.no_grad():
            assert torch.allclose(probabilities, network(pixels).softmax(1), atol=1e-5)
        assert probabilities.shape == (3, len(names))
    with pytest.raises(UserError, match="style"):
        classifiers(torch.as_tensor(images), "colour")


def test_answers_are_in_the_order_of_the_outputs(trained):
    classifiers = UnlearnCanvasClassifiers(**trained[1])
    image = torch.zeros(1, 8, 8, 3, dtype=torch.uint8)
    styles, objects = (classifiers(image, question)[0] for question in ("style", "object"))
    assert styles.index("Seed_Images") == 38 and styles[:38] + styles[39:] == STYLES and objects == OBJECTS


def test_missing_swapped_and_foreign_files_are_errors(trained, tmp_path):
    paths = trained[1]
    with pytest.raises(UserError, match=r"judge\.classifier\.style.*OPTML-Group/UnlearnCanvas"):
        UnlearnCanvasClassifiers(None, paths["object"])
    with pytest.raises(UserError, match=r"none\.pth.*judge\.classifier\.object"):
        UnlearnCanvasClassifiers(paths["style"], tmp_path / "none.pth")
    with pytest.raises(UserError, match="20 classes instead of 51"):
        UnlearnCanvasClassifiers(paths["object"], paths["object"])
    torch.save({"state": {}}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"other\.pth"):
        UnlearnCanvasClassifiers(tmp_path / "other.pth", paths["object"])


def test_the_judge_composes(trained, tmp_path):
    files = [f"judge.classifier.{question}={path}" for question, path in trained[1].items()]
    settings = config(tmp_path, "judge=unlearncanvas", "evaluator=accuracy", *files)
    assert "argmax of UnlearnCanvas ViT (style " in instantiate(settings.evaluator.accuracy).protocol


def test_the_command_in_the_readme_has_the_papers_sampler(tmp_path):
    lines = (Path(CONF).parent / "README.md").read_text().splitlines()
    [command] = [line for line in lines if line.startswith("unlearn ") and "dataset=unlearncanvas" in line]
    settings = config(tmp_path, *shlex.split(command)[1:])
    assert (settings.sampler.steps, settings.sampler.guidance_scale) == (100, 9)
    assert "UnlearnCanvasClassifiers" in settings.judge.classifier._target_ and list(settings.evaluator) == ["accuracy"]

"""CLIP as a score and as a zero-shot classifier, with random weights."""

import re
import shutil
import string
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from tests import tiny
from unlearning.concepts import ERASE, RETAIN, SYNONYM, Concept, Prompt, UnlearningTask
from unlearning.errors import UserError
from unlearning.evaluators.clip_score import CLIPScore
from unlearning.evaluators.own_prompt import OwnPrompt
from unlearning.judges.zero_shot import ZeroShotCLIP
from unlearning.store.manifest import ManifestRow


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A CLIP of 16-pixel images and of texts that are spelt letter by letter."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clip")
    letters = string.ascii_lowercase
    pieces = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    tokens = CLIPTokenizer(vocab={p: i for i, p in enumerate(pieces)}, merges=[], model_max_length=32)
    layers = dict(hidden_size=16, intermediate_size=32, num_attention_heads=2, num_hidden_layers=1)
    ids = dict(bos_token_id=tokens.bos_token_id, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id)
    CLIPModel(
        CLIPConfig(
            text_config=dict(vocab_size=len(tokens), max_position_embeddings=32, **layers, **ids),
            vision_config=dict(image_size=16, patch_size=8, **layers),
            projection_dim=8,
        )
    ).eval().save_pretrained(path)
    size = {"height": 16, "width": 16}
    CLIPProcessor(CLIPImageProcessor(size=size, crop_size=size), tokens).save_pretrained(path)
    return path


@pytest.fixture
def images():
    return np.random.default_rng(0).integers(0, 256, (4, 24, 24, 3), dtype=np.uint8)


def logits(path, images, texts):
    """transformers' own logits of images and texts (B, N), and their scale."""
    clip, processor = CLIPModel.from_pretrained(path).eval(), CLIPProcessor.from_pretrained(path)
    inputs = processor(text=texts, images=list(images), return_tensors="pt", padding=True)
    with torch.no_grad():
        return clip(**inputs).logits_per_image, clip.logit_scale.exp().item()


def rows(prompts, roles):
    return [ManifestRow(Path("x.png"), prompt, role, {}, 0) for prompt, role in zip(prompts, roles, strict=True)]


def test_the_score_is_100_times_the_cosine_by_role(path, images):
    prompts = ["a photo of the cat", "a ship", "dog", "a photo of the cat"]
    metric = CLIPScore(path, device="cpu")
    metric.update(images[:3], rows(prompts[:3], [RETAIN, RETAIN, ERASE]))
    metric.update(images[3:], rows(prompts[3:], [RETAIN]))
    scores, scale = logits(path, images, prompts)
    cosines = (scores / scale).diagonal()
    expected = {"fidelity/clip_score": cosines[[0, 1, 3]].mean(), "efficacy/clip_score_e": cosines[2]}
    expected = {key: max(0.0, 100 * cosine.item()) for key, cosine in expected.items()}
    expected["summary/h_a"] = expected["fidelity/clip_score"] - expected["efficacy/clip_score_e"]
    assert metric.compute() == pytest.approx(expected, abs=1e-3)
    assert any(expected.values()) and set(expected) == set(CLIPScore.higher_is_better)


def test_a_nan_score_stays_nan(path, images):
    metric = CLIPScore(path, device="cpu")
    metric.update(images[:2], rows(["a cat", "a dog"], [RETAIN, ERASE]))
    metric.scores[1] = float("nan")
    assert np.isnan(metric.compute()["efficacy/clip_score_e"])


def test_a_long_prompt_is_cut_after_the_last_token_that_fits(path, images):
    def score(prompt):
        metric = CLIPScore(path, device="cpu")
        metric.update(images, rows([prompt] * 4, [RETAIN] * 4))
        return metric.compute()

    fitting = " ".join("abcdefghij" * 3)  # and the start and end tokens
    assert score(fitting + " k l m") == pytest.approx(score(fitting), abs=1e-4)


def test_absent_roles_give_no_key(path, images):
    metric = CLIPScore(path, device="cpu")
    metric.update(images, rows(["a cat"] * 4, [SYNONYM] * 4))
    assert metric.compute() == {}
    metric.update(images, rows(["a cat"] * 4, [RETAIN] * 4))
    assert list(metric.compute()) == ["fidelity/clip_score"]


def test_merged_processes_equal_a_single_process(path, images):
    whole, *parts = (CLIPScore(path, device="cpu") for _ in range(3))
    asked = rows(["a cat", "dog", "ship", "sea"], [RETAIN, ERASE, RETAIN, RETAIN])
    whole.update(images, asked)
    parts[0].update(images[:1], asked[:1])
    parts[1].update(images[1:], asked[1:])
    parts[0].merge_state(parts[1])
    assert parts[0].compute() == pytest.approx(whole.compute(), abs=1e-4)


def test_the_protocol_names_the_backbone_and_its_weights(path):
    protocol = CLIPScore(path, device="cpu").protocol
    assert path.name in protocol and str(path.parent) not in protocol


def test_zero_shot_probabilities_are_transformers_own(path, images):
    classifier = ZeroShotCLIP(path, names={"object": ["cat", "dog", "ship"]})
    names, p = classifier(torch.as_tensor(images), "object")
    expected, _ = logits(path, images, [f"a photo of the {name}" for name in names])
    assert names == ("cat", "dog", "ship")
    assert torch.allclose(p, F.softmax(expected, 1), atol=1e-4)
    assert torch.equal(classifier(torch.as_tensor(images), "object")[1], p)


def test_the_name_of_the_classifier_depends_on_the_names(path):
    name, same, other = (ZeroShotCLIP(path, names={"object": answers}).name for answers in ("ab", "ab", "ac"))
    assert name == same != other and "2 objects" in name


def test_zero_shot_defaults_to_cifar10(path, images):
    names, p = ZeroShotCLIP(path)(torch.as_tensor(images), "object")
    assert names == ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    assert p.shape == (4, 10)
    with pytest.raises(UserError, match="object"):
        ZeroShotCLIP(path)(torch.as_tensor(images), "style")


@pytest.mark.parametrize("kind, setting", [(CLIPScore, "judge.clip"), (ZeroShotCLIP, "judge.classifier.model")])
def test_missing_weights_name_the_setting(kind, setting, tmp_path):
    with pytest.raises(UserError, match=rf"`{setting}`"):
        kind(str(tmp_path / "none"))


@pytest.mark.parametrize("kind", [CLIPScore, ZeroShotCLIP])
def test_a_clip_that_lacks_a_weight_is_refused(kind, path, tmp_path):
    folder = shutil.copytree(path, tmp_path / "clip")
    name = tiny.lose_a_weight(folder / "model.safetensors")
    with pytest.raises(UserError, match=re.escape(name)):
        kind(str(folder))


# --- an image's own prompt --------------------------------------------------------------------------------------------


def test_own_prompt_is_the_softmax_over_the_tasks_prompts(path, images):
    prompts = [("a cat", ERASE), ("a kitty", SYNONYM), ("a dog", RETAIN), ("a ship", RETAIN)]
    metric = OwnPrompt(path, device="cpu")
    metric.prepare(UnlearningTask((Concept("cat"),), prompts=tuple(Prompt(*p) for p in prompts)))
    rows = [ManifestRow(Path("x"), text, role, {}, 0) for text, role in prompts]
    metric.update(images[:3], rows[:3])
    metric.update(images[3:], rows[3:])
    metric.update(images[:2], [replace(rows[0], prompt="another"), replace(rows[0], role="another")])  # both skipped
    own = logits(path, images, [text for text, _ in prompts])[0].softmax(1).diagonal().tolist()
    numbers = metric.compute()
    assert numbers["efficacy/acc_e_own"] == pytest.approx(100 * own[0], rel=1e-4)
    assert numbers["efficacy/acc_g_own"] == pytest.approx(100 * own[1], rel=1e-4)
    assert numbers["retention/acc_s_own"] == pytest.approx(50 * (own[2] + own[3]), rel=1e-4)
    assert 0 < numbers["summary/h_o_own"] < 100 and "4 prompts" in metric.protocol
    assert set(numbers) == set(OwnPrompt.higher_is_better)

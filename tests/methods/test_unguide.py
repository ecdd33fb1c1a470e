"""UnGuide's theorems (arXiv:2508.05755): its objective, its routing, and the exported adapter in plain diffusers."""

from dataclasses import replace
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from tests import tiny
from unlearning.concepts import Concept, UnlearningTask
from unlearning.erasures.base import Erasure
from unlearning.erasures.module_edit import Adapter
from unlearning.errors import UserError
from unlearning.methods.unguide import UnGuide, best_threshold
from unlearning.models.ldm import diffusers_name, read_adapter
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.sampler import Sampler
from unlearning.training.student import LoRA

CAT, FOREST = "a photo of the cat", "a photo of the forest"
TASK = UnlearningTask(erase=(Concept("cat", anchor="forest"),), retain=tuple(Concept(n) for n in ("dog", "sky", "sea")))


@pytest.fixture(scope="module")
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


def unguide(*, iterations=2, lr=1e-2, eta=2.0, rank=1, **more) -> UnGuide:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return UnGuide(
        **{"steps": 4, "repeats": 2, "eta": eta, "iterations": iterations, **more},
        student=LoRA(r"attn2\.to_(k|v)$|add_(k|v)_proj$", rank=rank),
        optimizer=partial(torch.optim.Adam, lr=lr),
        trainer=partial(pl.Trainer, enable_model_summary=False, **quiet),
    )


@pytest.fixture(scope="module")
def adapter(model) -> Adapter:
    torch.manual_seed(0)
    return unguide(iterations=3, lr=0.1, rank=2).fit(model, TASK)


# --- the objective ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 2.0])
def test_the_target_leads_away_from_the_concept_past_the_anchor(model, eta):
    """With the student still the teacher the loss is || (1 + eta) (eps_c - eps_ref) ||^2: the anchor's at eta = 0."""
    method = unguide(eta=eta)
    method.student, method.teacher, method.task = model, model.snapshot([]), TASK
    x_t, t, c = model.noise([5]), torch.tensor([400]), model.encode_prompts([CAT])
    method.points = lambda model, prompts: (x_t, t, c)
    eps_c, eps_ref = model.predict(x_t, t, c), model.predict(x_t, t, model.encode_prompts([FOREST]))
    target = eps_ref - eta * (eps_c - eps_ref)
    torch.testing.assert_close(method.loss([CAT]), (eps_c - target).pow(2).mean(), atol=1e-7, rtol=1e-3)


def test_every_concept_has_its_own_anchor(model):
    method = unguide()
    method.task = UnlearningTask(erase=(Concept("cat", anchor="forest"), Concept("ship")))
    assert method.anchors(["a photo of the ship", CAT]) == ["", FOREST]


def test_training_brings_the_concepts_prediction_to_the_anchors(model):
    torch.manual_seed(0)
    settings = {"trajectory": "reuse", "steps": 10, "batch_size": 8, "schedule": "diffusers"}
    adapter = unguide(eta=0.0, iterations=40, lr=5e-3, rank=8, **settings).fit(model, TASK)
    c, anchor = model.encode_prompts([CAT] * 16), model.encode_prompts([FOREST] * 16)
    x, t = torch.randn(16, *model.latent_shape), torch.randint(1000, (16,))
    target, before = model.predict(x, t, anchor), model.predict(x, t, c)
    with adapter.applied_to(model):
        after = model.predict(x, t, c)
    assert (after - target).pow(2).mean() < 0.5 * (before - target).pow(2).mean()


# --- the threshold ----------------------------------------------------------------------------------------------------


def test_the_papers_threshold_is_the_null_prompts_difference(model, adapter):
    rule = adapter.guidance
    with adapter.applied_to(model):
        D = model.guidance.differences(model, model.encode_prompts([""]), 7.5)
    assert float(D) == pytest.approx(rule.threshold, rel=1e-5) and rule.empty == rule.threshold


def test_a_calibrated_threshold_separates_the_two_groups(model, adapter):
    assert best_threshold(torch.tensor([4.0, 5.0]), torch.tensor([1.0, 2.0])) == 3.0
    assert best_threshold(torch.tensor([3.0, 5.0, 6.0]), torch.tensor([1.0, 1.1, 3.5])) == pytest.approx(2.05)
    with pytest.raises(UserError, match="empty, calibrated"):
        unguide(threshold="guess")


@pytest.mark.parametrize("retain", [TASK.retain, ()])
def test_a_threshold_is_calibrated_on_prompts_that_no_evaluation_uses(model, monkeypatch, retain):
    asked, method = [], unguide(threshold="calibrated")
    encode = type(model).encode_prompts
    monkeypatch.setattr(
        type(model), "encode_prompts", lambda self, prompts: asked.extend(prompts) or encode(self, prompts)
    )
    rule = method.fit(model, replace(TASK, retain=retain)).guidance
    assert rule.empty > 0 and rule.threshold > 0
    assert "a cat" in asked and ("an image of a sky" in asked) == bool(retain)
    assert not {FOREST.replace("forest", c.name) for c in retain} & set(asked)


# --- the adapter in other hands ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("any_pipeline", ["sd1", "sd3"], indirect=True)
def test_plain_diffusers_loads_the_export(any_pipeline, tmp_path):
    family, folder = any_pipeline
    model = tiny.FAMILIES[family].load(str(folder), device="cpu")
    trained = unguide(iterations=2, lr=0.3, schedule="diffusers").fit(model, TASK)
    trained.save(tmp_path, base=model)
    pure = Erasure.load(tmp_path)
    with replace(pure, guidance=None).applied_to(model):
        ours = Sampler(steps=3)(model, [CAT], [1])
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.load_lora_weights(tmp_path, weight_name="weights.safetensors")
    theirs = tiny.drawn_by_diffusers(family, pipe, [CAT], [1], steps=3, scale=7.5)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    assert not torch.allclose(ours, Sampler(steps=3)(model, [CAT], [1]), atol=1e-3)


def ldm_unet() -> dict[str, str]:
    """Every layer of ldm's UNet at Stable Diffusion 1's layout, that is, of its openaimodel.py: name to kind."""
    resnet = ["in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection"]
    block = [f"transformer_blocks.0.{n}" for n in (
        *(f"attn{i}.{m}" for i in (1, 2) for m in ("to_q", "to_k", "to_v", "to_out.0")),
        "ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3",
    )]  # fmt: skip
    attention = ["norm", "proj_in", "proj_out", *block]
    layers = ["time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2"]
    for level in range(4):
        for layer in range(2):
            parts = [("0", resnet)] + ([("1", attention)] if level < 3 else [])
            layers += [f"input_blocks.{1 + 3 * level + layer}.{p}.{n}" for p, names in parts for n in names]
        layers += [f"input_blocks.{3 + 3 * level}.0.op"] if level < 3 else []
        for layer in range(3):
            parts = [("0", resnet)] + ([("1", attention)] if level > 0 else [])
            layers += [f"output_blocks.{3 * level + layer}.{p}.{n}" for p, names in parts for n in names]
        layers += [f"output_blocks.{2 + 3 * level}.{2 if level else 1}.conv"] if level < 3 else []
    layers += [f"middle_block.{i}.{n}" for i, names in ((0, resnet), (1, attention), (2, resnet)) for n in names]
    return layers


LINEAR = ("to_q", "to_k", "to_v", "to_out.0", "proj", "net.2", "emb_layers.1", "time_embed.0", "time_embed.2")


def test_ldms_names_are_those_that_diffusers_converter_finds():
    """Every layer's weight carries its own number through diffusers' conversion of a whole checkpoint."""
    layers = ldm_unet()
    state = {}
    for number, layer in enumerate(layers):
        for part in ("weight", "bias"):
            state[f"model.diffusion_model.{layer}.{part}"] = torch.full((1, 1, 1, 1), float(number))
    with torch.device("meta"):  # a UNet without memory
        config = dict(UNet2DConditionModel(layers_per_block=2).config)
    theirs = {int(v.flatten()[0]): k.removesuffix(".weight")
              for k, v in convert_ldm_unet_checkpoint(state, config).items() if k.endswith(".weight")}  # fmt: skip
    mappable = [(i, layer) for i, layer in enumerate(layers) if layer.endswith(LINEAR)]
    assert len(mappable) > 150
    for number, layer in mappable:
        assert diffusers_name(layer) == diffusers_name(f"model.diffusion_model.{layer}") == theirs[number]
    with pytest.raises(ValueError, match="not a layer"):
        diffusers_name("out.2")


def test_unguides_own_file_becomes_an_adapter(model, tmp_path):
    """W' = W + alpha (A B)^T, computed by hand on the weights, draws the same."""
    torch.manual_seed(0)
    into = {"down_blocks.1.attentions.0": "input_blocks.4.1", "mid_block.attentions.0": "middle_block.1",
            "up_blocks.0.attentions.1": "output_blocks.1.1"}  # fmt: skip
    state, merged, own = {}, {}, model.named_parameters()
    for ours, ldm in into.items():
        for which in ("to_k", "to_v"):
            inner = f"transformer_blocks.0.attn2.{which}"
            W = own[f"unet.{ours}.{inner}.weight"]
            A, B = torch.randn(W.shape[1], 1), torch.randn(1, W.shape[0])
            state |= {f"{ldm}.{inner}.lora.A": A, f"{ldm}.{inner}.lora.B": B}
            merged[f"unet.{ours}.{inner}.weight"] = W + 8 * (A @ B).T
    torch.save(state, tmp_path / "lora.pth")
    snapshot = model.snapshot(merged)
    snapshot.weights = merged
    x_t, t, c = model.noise([5]), torch.tensor([400]), model.encode_prompts([CAT])
    expected = snapshot.predict(x_t, t, c)
    imported = unguide(lora=str(tmp_path / "lora.pth")).fit(model, TASK)
    with imported.applied_to(model):
        torch.testing.assert_close(model.predict(x_t, t, c), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("content", [b"junk", {"a.lora.C": torch.ones(1)}, {"x.y.lora.A": torch.ones(1, 1)}, [1, 2]])
def test_a_file_that_is_not_an_adapter_gives_an_error(tmp_path, content):
    path = tmp_path / "lora.pth"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(UserError, match=r"lora\.pth is not an adapter"):
        read_adapter(path, 8.0)

"""Erased weights from other code: all supported formats, and errors for unsupported ones."""

import json
import pickle
import re
from contextlib import nullcontext

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from safetensors.torch import save_file

from tests import tiny
from unlearning.concepts import Concept, UnlearningTask
from unlearning.erasures.base import Erasure
from unlearning.erasures.module_edit import Adapter
from unlearning.erasures.weight_patch import WeightPatch
from unlearning.errors import UserError
from unlearning.methods.weights import SavedWeights
from unlearning.models.ldm import converted, is_whole
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.models.stable_diffusion_3 import StableDiffusion3
from unlearning.models.stable_diffusion_xl import StableDiffusionXL

TASK = UnlearningTask((Concept("cat"),))
K = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
LAYERS = [f"unet.{K}", "unet.mid_block.attentions.0.proj_in", "unet.down_blocks.0.resnets.0.conv1",
          "unet.up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0",
          "text_encoder.encoder.layers.0.self_attn.q_proj", "text_encoder.encoder.layers.0.mlp.fc1"]  # fmt: skip


@pytest.fixture(scope="module")
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


@pytest.fixture(scope="module")
def edited(model):
    """New values of all weights of UNet and text encoder, by full name."""
    generator = torch.Generator().manual_seed(0)
    chosen = {n: p for n, p in model.named_parameters().items() if n.startswith(("unet.", "text_encoder."))}
    return {n: p + 0.1 * torch.randn(p.shape, generator=generator) for n, p in chosen.items()}


@pytest.fixture(scope="module")
def adapter(model):
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name in LAYERS:
        out, into, *kernel = model.layer(name).weight.shape
        weights[f"{name}.lora_A.weight"] = torch.randn(2, into, *kernel, generator=generator)
        weights[f"{name}.lora_B.weight"] = torch.randn(out, 2, *[1] * len(kernel), generator=generator)
    return Adapter(weights)


def read(path, model, **more) -> Erasure:
    return SavedWeights(path=str(path), **more).fit(model, TASK)


def predicted(model, erasure=None) -> torch.Tensor:
    with erasure.applied_to(model) if erasure else nullcontext(), torch.no_grad():
        return model.predict(model.noise([5]), torch.tensor([400]), model.encode_prompts(["a cat"]))


def of(part: str, weights: dict, prefix: str = "") -> dict:
    return {prefix + n.removeprefix(f"{part}."): v.contiguous() for n, v in weights.items() if n.startswith(f"{part}.")}


# --- state dicts ------------------------------------------------------------------------------------------------------

LDM = {"mid_block.attentions.0": "middle_block.1", "down_blocks.1.attentions.0": "input_blocks.4.1"}


def in_ldm(edited: dict) -> dict:
    return {
        f"model.diffusion_model.{ldm}.{n.removeprefix(f'unet.{ours}.')}": v
        for ours, ldm in LDM.items() for n, v in edited.items() if n.startswith(f"unet.{ours}.") and "attn2" in n
    }  # fmt: skip


STATES = {
    "a whole UNet": lambda e: of("unet", e),
    "some of a UNet": lambda e: {n: v for n, v in of("unet", e).items() if "attn2" in n},
    "by full name": lambda e: {n: v for n, v in e.items() if "attn2" in n},
    "nested": lambda e: {"unet": {n: v for n, v in of("unet", e).items() if "attn2" in n}},
    "a trainer's": lambda e: {"state_dict": of("unet", e), "epoch": 3},
    "ldm's": in_ldm,
    "a text encoder": lambda e: of("text_encoder", e),
    "a text encoder of earlier transformers": lambda e: (
        of("text_encoder", e, "text_model.") | {"text_model.embeddings.position_ids": torch.arange(32)[None]}
    ),
}


RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
          "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}  # fmt: skip
PART = {"resnets": 0, "attentions": 1}


def in_whole_ldm(unet: dict, layers: int = 1) -> dict:
    """All weights of a UNet by ldm's names. The tiny one has one layer a block, and Stable Diffusion two."""
    after = {block: 1 + any(f"up_blocks.{block}.attentions" in name for name in unet) for block in "0123"}
    places = {
        r"conv_in\.": "input_blocks.0.0.",
        r"conv_norm_out\.": "out.0.",
        r"conv_out\.": "out.2.",
        r"time_embedding\.linear_([12])": lambda m: f"time_embed.{2 * int(m[1]) - 2}",
        r"down_blocks\.(\d)\.(resnets|attentions)\.(\d)": (
            lambda m: f"input_blocks.{1 + (layers + 1) * int(m[1]) + int(m[3])}.{PART[m[2]]}"
        ),
        r"down_blocks\.(\d)\.downsamplers\.0\.conv": lambda m: f"input_blocks.{(layers + 1) * (1 + int(m[1]))}.0.op",
        r"mid_block\.resnets\.(\d)": lambda m: f"middle_block.{2 * int(m[1])}",
        r"mid_block\.attentions\.0": "middle_block.1",
        r"up_blocks\.(\d)\.(resnets|attentions)\.(\d)": (
            lambda m: f"output_blocks.{(layers + 1) * int(m[1]) + int(m[3])}.{PART[m[2]]}"
        ),
        r"up_blocks\.(\d)\.upsamplers\.0": (
            lambda m: f"output_blocks.{(layers + 1) * int(m[1]) + layers}.{after[m[1]]}"
        ),
    }
    found = {}
    for name, value in unet.items():
        for ours, theirs in places.items():
            name = re.sub(rf"^{ours}", theirs, name)
        if ".transformer_blocks." not in name:
            for ours, theirs in RESNET.items():
                name = name.replace(f".{ours}.", f".{theirs}.")
        found[name] = value
    return found


def vae_in_ldm(vae: dict) -> dict:
    """All weights of an autoencoder of four levels by ldm's names, where attention has convolutions."""
    places = {
        r"down_blocks\.(\d)\.resnets": r"down.\1.block",
        r"down_blocks\.(\d)\.downsamplers\.0": r"down.\1.downsample",
        r"up_blocks\.(\d)\.resnets": lambda m: f"up.{3 - int(m[1])}.block",
        r"up_blocks\.(\d)\.upsamplers\.0": lambda m: f"up.{3 - int(m[1])}.upsample",
        r"mid_block\.resnets\.(\d)": lambda m: f"mid.block_{1 + int(m[1])}",
        r"mid_block\.attentions\.0\.group_norm": "mid.attn_1.norm",
        r"mid_block\.attentions\.0\.to_([qkv])": r"mid.attn_1.\1",
        r"mid_block\.attentions\.0\.to_out\.0": "mid.attn_1.proj_out",
        r"conv_norm_out": "norm_out",
        r"conv_shortcut": "nin_shortcut",
    }
    found = {}
    for name, value in vae.items():
        value = value[..., None, None] if ".attentions." in name and value.ndim == 2 else value
        for ours, theirs in places.items():
            name = re.sub(ours, theirs, name)
        found[name] = value
    return found


def test_a_published_checkpoint_of_stable_diffusion_1_has_all_its_weights_converted():
    """Its architecture and all its names; the weights take no memory."""
    levels = {"block_out_channels": (128, 256, 512, 512), "down_block_types": ["DownEncoderBlock2D"] * 4,
              "up_block_types": ["UpDecoderBlock2D"] * 4, "layers_per_block": 2}  # fmt: skip
    with torch.device("meta"):
        unet, vae = UNet2DConditionModel(cross_attention_dim=768), AutoencoderKL(**levels)
    own = {"unet": unet.state_dict(), "vae": vae.state_dict()}
    assert [len(state) for state in own.values()] == [686, 248], "as many as the published file has"
    state = {f"model.diffusion_model.{n}": v for n, v in in_whole_ldm(own["unet"], layers=2).items()}
    state |= {f"first_stage_model.{n}": v for n, v in vae_in_ldm(own["vae"]).items()}
    names = "\n".join(state)
    for published in (
        "input_blocks.3.0.op.weight", "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight",
        "input_blocks.11.0.out_layers.3.bias", "middle_block.1.proj_in.weight", "output_blocks.2.1.conv.weight",
        "output_blocks.5.2.conv.weight", "output_blocks.11.1.proj_out.bias", "out.2.weight", "time_embed.2.bias",
        "encoder.down.1.block.0.nin_shortcut.weight", "decoder.up.3.upsample.conv.weight", "mid.attn_1.proj_out.weight",
        "post_quant_conv.weight",
    ):  # fmt: skip
        assert f"{published}\n" in f"{names}\n", published
    beside = {"betas": torch.rand(1000), "sqrt_alphas_cumprod": torch.rand(1000), "model_ema.decay": torch.ones(())}
    assert is_whole(state)
    found = converted({**state, **beside}, unet, vae)
    for part, expected in own.items():
        shapes = {n.removeprefix(f"{part}."): v.shape for n, v in found.items() if n.startswith(f"{part}.")}
        assert shapes == {name: value.shape for name, value in expected.items()}
    assert len(found) == 686 + 248


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "diffusion_model.", ""])
def test_a_whole_unet_of_ldm_is_converted(model, edited, tmp_path, prefix):
    unet = of("unet", edited)
    state = {f"{prefix}{name}": value for name, value in in_whole_ldm(unet).items()}
    assert not any("resnets" in name for name in state) and len(state) == len(unet)
    save_file(state, tmp_path / "erased.safetensors")
    erasure = read(tmp_path / "erased.safetensors", model)
    assert erasure.weights.keys() == {f"unet.{name}" for name in unet}
    assert all(torch.equal(v, edited[n]) for n, v in erasure.weights.items())


def test_a_whole_checkpoint_of_ldm_is_converted(model, edited, tmp_path):
    text = of("text_encoder", edited, "cond_stage_model.transformer.text_model.")
    unet = {f"model.diffusion_model.{name}": value for name, value in in_whole_ldm(of("unet", edited)).items()}
    vae = {"first_stage_model.quant_conv.bias": torch.ones(8), "first_stage_model.decoder.norm_out.bias": torch.ones(8),
           "first_stage_model.decoder.up.1.block.0.conv1.bias": torch.ones(8)}  # fmt: skip
    beside = {"betas": torch.rand(1000), "model_ema.decay": torch.tensor(0.9),
              "model_ema.diffusion_modelout2bias": torch.ones(4)}  # fmt: skip
    torch.save({"state_dict": {**unet, **text, **vae, **beside}, "global_step": 3}, tmp_path / "model.ckpt")
    weights = read(tmp_path / "model.ckpt", model).weights
    own = {"vae.quant_conv.bias", "vae.decoder.conv_norm_out.bias", "vae.decoder.up_blocks.0.resnets.0.conv1.bias"}
    assert weights.keys() == edited.keys() | own
    assert all(torch.equal(v, edited.get(n, torch.ones(8))) for n, v in weights.items())


def test_a_whole_checkpoint_of_another_model_is_refused(model, edited, sd3, tmp_path):
    state = in_whole_ldm(of("unet", edited))
    for wrong, words in (
        ({"label_emb.0.0.weight": torch.ones(2, 2)}, "diffusers knows"),
        ({"out.2.bias": torch.ones(5)}, r"conv_out\.bias is \(5,\)"),
        ({"input_blocks.4.0.in_layers.0.weight": torch.ones(8)}, "no weight"),
    ):
        save_file({**state, **wrong}, tmp_path / "erased.safetensors")
        with pytest.raises(UserError, match=rf"erased\.safetensors.*{words}"):
            read(tmp_path / "erased.safetensors", model)
    with pytest.raises(UserError, match="a UNet, which"):
        read(tmp_path / "erased.safetensors", StableDiffusion3.load(str(sd3), device="cpu"))


@pytest.mark.parametrize("name", STATES)
def test_a_state_dict_becomes_new_values(model, edited, tmp_path, name):
    state = STATES[name](edited)
    torch.save(state, tmp_path / "erased.pt")
    erasure = read(tmp_path / "erased.pt", model)
    assert isinstance(erasure, WeightPatch) and erasure.weights
    assert all(torch.equal(v, edited[n]) for n, v in erasure.weights.items())
    flat = state.get("state_dict", state.get("unet", state))
    assert len(erasure.weights) == len([n for n in flat if not n.endswith("position_ids")])
    assert not torch.equal(predicted(model, erasure), predicted(model))


def test_safetensors_in_half_precision_are_read_and_the_same_weights_are_left_out(model, edited, tmp_path):
    state = {n: p.detach() for n, p in of("unet", model.named_parameters()).items()}
    state[f"{K}.weight"] = edited[f"unet.{K}.weight"].half()
    save_file(state, tmp_path / "erased.safetensors")
    assert [*read(tmp_path / "erased.safetensors", model).weights] == [f"unet.{K}.weight"]


# --- LoRAs ------------------------------------------------------------------------------------------------------------


def kohya(weights: dict) -> dict:
    """As kohya and SPM save them: with the alpha of each layer, here half of its rank."""
    state = convert_state_dict_to_kohya(dict(weights))
    state = {n.replace("lora_te1_encoder", "lora_te_text_model_encoder"): v for n, v in state.items()}
    return {n: torch.tensor(1.0) if n.endswith(".alpha") else 2 * v if "lora_up" in n else v for n, v in state.items()}


def renamed(weights: dict, down: str, up: str) -> dict:
    return {n.replace(".lora_A", down).replace(".lora_B", up): v for n, v in weights.items()}


def old(weights: dict) -> dict:
    """As diffusers saved attention processors in 2023."""
    state = {n: v for n, v in weights.items() if "attn" in n and n.startswith("unet.")}
    state = {n.replace("attn2.", "attn2.processor.").replace("attn1.", "attn1.processor."): v for n, v in state.items()}
    return {n.replace(".to_out.0", ".to_out"): v for n, v in renamed(state, "_lora.down", "_lora.up").items()}


LORAS = {
    "diffusers": dict,
    "diffusers of 2024": lambda w: (
        renamed(of("unet", w, "unet."), ".lora.down", ".lora.up")
        | renamed(of("text_encoder", w, "text_encoder."), ".lora_linear_layer.down", ".lora_linear_layer.up")
    ),
    "diffusers of 2023": old,
    "peft": lambda w: {f"base_model.model.{n}": v for n, v in of("unet", w).items()},
    "peft with a name": lambda w: renamed(of("unet", w, "base_model.model."), ".lora_A.default", ".lora_B.default"),
    "kohya": kohya,
}


@pytest.mark.parametrize("name", LORAS)
def test_a_lora_becomes_an_adapter(model, adapter, tmp_path, name):
    state = LORAS[name](adapter.weights)
    save_file({n: v.contiguous() for n, v in state.items()}, tmp_path / "lora.safetensors")
    erasure = read(tmp_path / "lora.safetensors", model)
    assert isinstance(erasure, Adapter) and len(erasure.weights) >= 4
    there = {n: v for n, v in adapter.weights.items() if n in erasure.weights}
    assert len(there) == len(erasure.weights)
    torch.testing.assert_close(predicted(model, erasure), predicted(model, Adapter(there)))
    assert not torch.allclose(predicted(model, erasure), predicted(model))


def test_alpha_and_scale_count(model, adapter, tmp_path):
    state = of("unet", adapter.weights, "base_model.model.")
    save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8, "r": 2}')
    weights = read(tmp_path / "adapter_model.safetensors", model, scale=0.5).weights
    name = f"unet.{K}.lora_B.weight"
    torch.testing.assert_close(weights[name], 0.5 * 8 / 2 * adapter.weights[name])
    metadata = {"lora_adapter_metadata": '{"unet.lora_alpha": 8, "unet.r": 2}'}
    save_file(of("unet", adapter.weights, "unet."), tmp_path / "diffusers.safetensors", metadata)
    (tmp_path / "adapter_config.json").unlink()
    torch.testing.assert_close(
        read(tmp_path / "diffusers.safetensors", model).weights[name], 8 / 2 * adapter.weights[name]
    )


def test_alpha_counts_in_a_file_of_the_denoiser_alone(model, tmp_path):
    """As diffusers' unet.save_lora_adapter writes it: neither names nor metadata begin with the part."""
    state = {f"{K}.lora_A.weight": torch.randn(4, 16), f"{K}.lora_B.weight": (B := torch.randn(16, 4))}
    save_file(state, tmp_path / "lora.safetensors", {"lora_adapter_metadata": '{"lora_alpha": 8, "r": 4}'})
    torch.testing.assert_close(read(tmp_path / "lora.safetensors", model).weights[f"unet.{K}.lora_B.weight"], 8 / 4 * B)


@pytest.mark.parametrize("place", ["beside the file", "in the file"])
def test_rank_stabilised_alpha_counts_by_the_root_of_each_layers_rank(model, tmp_path, place):
    config = {"lora_alpha": 8, "r": 16, "use_rslora": True, "rank_pattern": {K: 4}}
    state = {f"{K}.lora_A.weight": torch.randn(4, 16), f"{K}.lora_B.weight": (B := torch.randn(16, 4))}
    if place == "in the file":
        metadata = {"lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in config.items()})}
        save_file({f"unet.{name}": value for name, value in state.items()}, tmp_path / "lora.safetensors", metadata)
    else:
        save_file({f"base_model.model.{name}": value for name, value in state.items()}, tmp_path / "lora.safetensors")
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    torch.testing.assert_close(
        read(tmp_path / "lora.safetensors", model).weights[f"unet.{K}.lora_B.weight"], 8 / 4**0.5 * B
    )


@pytest.mark.parametrize(
    "config", ["", "[1]", "{}", '{"lora_alpha": "x"}', '{"lora_alpha": 8, "alpha_pattern": {"a": 4}}']
)
def test_a_lora_whose_alpha_is_not_known_is_refused(model, adapter, tmp_path, config):
    save_file(of("unet", adapter.weights, "base_model.model."), tmp_path / "lora.safetensors")
    (tmp_path / "adapter_config.json").write_text(config)
    with pytest.raises(UserError, match=f"{tmp_path}.*alpha"):
        read(tmp_path / "lora.safetensors", model)


def test_unguides_lora_is_an_adapter(model, tmp_path):
    A, B = torch.randn(16, 1), torch.randn(1, 16)
    torch.save({f"middle_block.1.transformer_blocks.0.attn2.to_k.lora.{n}": v for n, v in (("A", A), ("B", B))},
               tmp_path / "lora.pth")  # fmt: skip
    weights = read(tmp_path / "lora.pth", model).weights  # applied with 8, as its authors do
    assert torch.equal(weights[f"unet.{K}.lora_A.weight"], A.T)
    assert torch.equal(weights[f"unet.{K}.lora_B.weight"], 8 * B.T)
    assert torch.equal(read(tmp_path / "lora.pth", model, scale=1.0).weights[f"unet.{K}.lora_B.weight"], B.T)


def test_sdxls_second_text_encoder_has_its_own(tmp_path):
    sdxl = StableDiffusionXL.load(str(tiny.save("sdxl", tmp_path)), device="cpu")
    layer = "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj"
    A, B = torch.randn(2, 16), torch.randn(16, 2)
    flat = layer.replace("text_encoder_2", "lora_te2").replace(".", "_")
    save_file({f"{flat}.lora_down.weight": A, f"{flat}.lora_up.weight": B, f"{flat}.alpha": torch.tensor(2.0)},
              tmp_path / "lora.safetensors")  # fmt: skip
    weights = read(tmp_path / "lora.safetensors", sdxl).weights
    assert {n.partition(".")[0] for n in weights} == {"text_encoder_2"} and len(weights) == 2
    assert not torch.equal(predicted(sdxl, Adapter(weights)), predicted(sdxl))


# --- our own ----------------------------------------------------------------------------------------------------------


def test_an_erasure_of_an_earlier_run_is_read_and_only_for_its_model(model, edited, adapter, tmp_path):
    for i, erasure in enumerate((WeightPatch({n: v for n, v in edited.items() if K in n}), adapter)):
        erasure.save(tmp_path / str(i), base=model)
        assert read(tmp_path / str(i), model).digest == erasure.digest
    other = StableDiffusion.load(str(tiny.save("sd2", tmp_path)), device="cpu")
    with pytest.raises(UserError, match="another model"):
        read(tmp_path / "0", other)


def test_a_finished_erasure_is_measured_on_another_dataset(unlearn):
    first = unlearn("dataset=prompt", "method=uce", "stages=[fit]", run="first")
    chosen = ["method=weights", f"method.path={first}/erasure", "dataset=prompt", "concept=dog", "evaluator=clip_score"]
    second = unlearn(*chosen, run="second")
    assert (second / "metrics.json").exists()
    weights = [folder / "erasure" / "weights.safetensors" for folder in (first, second)]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_another_file_at_the_same_path_is_another_erasure(unlearn, sd1, tmp_path):
    command = ["dataset=prompt", "method=weights", f"method.path={tmp_path}/erased.safetensors", "stages=[fit]"]
    kept = []
    for factor in (2.0, 3.0):
        save_file({"conv_in.bias": torch.full((8,), factor)}, tmp_path / "erased.safetensors")
        kept.append((unlearn(*command) / "erasure" / "weights.safetensors").read_bytes())
    assert kept[0] != kept[1]


# --- what is refused --------------------------------------------------------------------------------------------------


class Bomb:
    """A pickle that writes a file if it is loaded."""

    def __init__(self, witness):
        self.witness = str(witness)

    def __reduce__(self):
        return open, (self.witness, "w")


def test_a_pickle_of_more_than_tensors_is_refused_unopened(model, tmp_path):
    (tmp_path / "erased.pt").write_bytes(pickle.dumps({"conv_in.bias": Bomb(tmp_path / "witness")}))
    with pytest.raises(UserError, match=r"erased\.pt"):
        read(tmp_path / "erased.pt", model)
    assert not (tmp_path / "witness").exists()


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ({"conv_in.bais": torch.ones(8)}, ["conv_in.bais", "Did you mean unet.conv_in.bias?"]),
        ({"conv_in.bias": torch.ones(9)}, ["unet.conv_in.bias", "(9,)", "(8,)"]),
        ({"conv_in.bias": torch.full((8,), torch.nan)}, ["not finite", "conv_in.bias"]),
        ({"conv_in.bias": torch.ones(8), "note": "cat"}, ["'note'"]),
        ([torch.ones(8)], ["no tensors"]),
        ({f"{K}.lora_A.weight": torch.ones(2, 16)}, ["A or B"]),
        ({f"unet.{K}x.lora_{n}.weight": torch.ones(2, 2) for n in "AB"}, [f"{K}x", f"Did you mean unet.{K}"]),
        ({f"{K}.lora_A.weight": torch.ones(2, 17), f"{K}.lora_B.weight": torch.ones(16, 2)}, [K, "17"]),
        ({f"{K}.hada_w1_a": torch.ones(2, 2)}, ["hada_w1_a"]),
    ],
)
def test_incompatible_weights_are_refused_by_name(model, tmp_path, state, words):
    torch.save(state, tmp_path / "erased.pt")
    with pytest.raises(UserError) as error:
        read(tmp_path / "erased.pt", model)
    assert all(word in str(error.value) for word in ("erased.pt", *words)) and "\n" not in str(error.value)


def test_missing_invalid_and_unchanged_weights_are_reported(model, tmp_path):
    (tmp_path / "broken.safetensors").write_bytes(b"junk")
    (tmp_path / "empty.pt").touch()
    save_file({"conv_in.bias": model.layer("unet.conv_in").bias.detach()}, tmp_path / "same.safetensors")
    for name in ("nothing.pt", "broken.safetensors", "empty.pt", "same.safetensors", "."):
        with pytest.raises(UserError, match=str(tmp_path / name).rstrip(".")):
            read(tmp_path / name, model)
    with pytest.raises(UserError, match=r"method\.path"):
        SavedWeights(path=None).fit(model, TASK)


def test_differences_are_added_to_the_weights(model, edited, tmp_path):
    own = model.named_parameters()
    whole = {n: v for n, v in edited.items() if n.startswith("unet.") and "attn2" in n}
    save_file(whole, tmp_path / "weights.safetensors")
    save_file({n: (0.01 * (v - own[n])).contiguous() for n, v in whole.items()}, tmp_path / "small.safetensors")
    save_file({n: (v - own[n]).contiguous() for n, v in whole.items()}, tmp_path / "difference.safetensors")
    with pytest.raises(UserError, match=r"method\.difference=true"):
        read(tmp_path / "small.safetensors", model)
    expected = predicted(model, read(tmp_path / "weights.safetensors", model))
    found = predicted(model, read(tmp_path / "difference.safetensors", model, difference=True))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)

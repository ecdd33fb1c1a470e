"""Every family, built from its own YAML with a tiny random pipeline instead of the real weights."""

import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DConditionModel
from hydra.utils import instantiate
from safetensors.torch import save_file
from torch import nn

from tests import tiny
from tests.composed import config
from unlearning.errors import UserError
from unlearning.models.conditioning import Conditioning
from unlearning.models.folders import fingerprint
from unlearning.models.side_modules import LowRank, SideModules
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.models.stable_diffusion_3 import StableDiffusion3
from unlearning.sampling.sampler import Sampler
from unlearning.scrubbing.prototypes import Prototypes
from unlearning.store.manifest import ManifestRow
from unlearning.training.student import Weights

SCALE = 5.0
YAML = {
    "sd1": ["emoji_unet", "sd14", "sd15"],
    "sd2": ["sd21"],
    "sdxl": ["sdxl"],
    "sd3": ["sd3"],
    "flux": ["flux"],
    "pixart": ["pixart"],
    "sana": ["sana"],
    "dit": ["dit"],
}


@pytest.fixture(scope="module")
def model(any_pipeline, tmp_path_factory):
    family, folder = any_pipeline
    cfg = config(
        tmp_path_factory.mktemp("x"), f"model={YAML[family][-1]}", f"model.path={folder}", "model.dtype=float32"
    )
    return instantiate(cfg.model)


@pytest.fixture
def attention(any_pipeline) -> str:
    """Names of weights that a method moves: esd_x's, where there is text to attend to."""
    return "attn1" if any_pipeline[0] == "dit" else r"attn2|\.add_"


def test_every_yaml_of_a_family_loads_a_folder_and_its_sampler_walks_as_the_pipeline_does(any_pipeline, tmp_path):
    family, folder = any_pipeline
    for name in YAML[family]:
        cfg = config(
            tmp_path, f"model={name}", f"model.path={folder}", "model.dtype=bfloat16", "model.attention_slicing=true"
        )
        loaded = instantiate(cfg.model)
        assert loaded.dtype == torch.bfloat16
        assert Sampler(steps=2)(loaded, ["a cat"], [0]).isfinite().all()
        assert instantiate(cfg.sampler).scheduler is type(loaded.pipeline.scheduler) is loaded.solver


def test_images_are_those_of_diffusers_own_pipeline(any_pipeline, model):
    family, _ = any_pipeline
    seeds, prompts = [3, 4], ["a cat", "a dog"]
    ours = Sampler(steps=4, guidance_scale=SCALE)(model, prompts, seeds)
    theirs = tiny.drawn_by_diffusers(family, model.pipeline, prompts, seeds, steps=4, scale=SCALE)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_images_of_another_size_are_those_of_diffusers_own_pipeline(any_pipeline, model):
    family, _ = any_pipeline
    side = Sampler(steps=1)(model, ["a cat"], [0]).shape[-1]
    row = ManifestRow(Path("x"), "a cat", "erase", {}, 3, height=side + 1, width=2 * side - 1)  # which is rounded
    draw = Sampler(steps=4, guidance_scale=SCALE)
    if family == "dit":
        with pytest.raises(UserError, match=f"{2 * side - 1} by {side + 1}"):
            draw.check(model, [row])
        return
    draw.check(model, [row])
    ours, _ = draw.draw(model, [row])
    size = tiny.SIDE, 2 * tiny.SIDE
    theirs = tiny.drawn_by_diffusers(family, model.pipeline, ["a cat"], [3], steps=4, scale=SCALE, size=size)
    assert ours.shape[-2:] == (side, 2 * side)
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    assert draw(model, ["a cat"], [3]).shape[-2:] == (side, side), "the model itself keeps its size"
    with pytest.raises(UserError, match=r"dataset\.sizes=false"):
        draw.draw(model, [row, replace(row, height=None)])


def test_a_size_beyond_the_model_is_refused_before_anything_is_drawn(sd3):
    model = StableDiffusion3.load(str(sd3), device="cpu")
    with pytest.raises(UserError, match="pixels a side"):
        Sampler().check(model, [ManifestRow(Path("x"), "a cat", "erase", {}, 3, height=4096)])


def test_a_batch_is_its_images_one_by_one(model):
    draw = Sampler(steps=3)
    together = draw(model, ["a cat", "a dog", ""], [1, 2, 3])
    alone = torch.cat([draw(model, [p], [s]) for p, s in [("a cat", 1), ("a dog", 2), ("", 3)]])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_noise_is_added_and_taken_away(model):
    x_0, eps = torch.randn(2, *model.latent_shape), torch.randn(2, *model.latent_shape)
    t = torch.tensor([10, 700])
    x_t = model.add_noise(x_0, eps, t)
    if model.prediction_type == "flow":
        sigma = t.reshape(-1, 1, 1, 1) / 1000
        torch.testing.assert_close(x_t, (1 - sigma) * x_0 + sigma * eps)
        target = eps - x_0
    else:
        schedule = DDPMScheduler.from_config(model.scheduler.config)
        torch.testing.assert_close(x_t, schedule.add_noise(x_0, eps, t))
        target = schedule.get_velocity(x_0, eps, t) if model.prediction_type == "v_prediction" else eps
    torch.testing.assert_close(model.to_x0(target, x_t, t), x_0, atol=1e-4, rtol=1e-3)


def test_a_snapshot_keeps_its_weights_and_shares_the_rest(model, attention):
    names = [n for n in model.named_parameters() if n.startswith(model.component) and re.search(attention, n)]
    c, x, t = model.encode_prompts(["a cat"]), model.noise([0]), torch.tensor(500)
    before, teacher = model.predict(x, t, c), model.snapshot(names)
    parameters = model.named_parameters()
    try:
        for name in names:
            parameters[name].add_(0.3)
        assert not torch.equal(model.predict(x, t, c), before)
        torch.testing.assert_close(teacher.predict(x, t, c), before, atol=1e-6, rtol=0)
        assert teacher.denoiser is model.denoiser
    finally:
        for name in names:
            parameters[name].copy_(teacher.weights[name])


def test_text_projections_are_where_the_prompt_enters(any_pipeline, model):
    projections = dict(model.text_projections())
    assert bool(projections) == (any_pipeline[0] != "dit"), "a class is no text"
    width = model.encode_prompts([""]).embeds.shape[-1]
    assert all(m.in_features == width for m in projections.values())
    assert all(f"{name}.weight" in model.named_parameters() for name in projections)


@pytest.mark.parametrize("any_pipeline", [f for f in tiny.FAMILIES if f not in ("sana", "dit")], indirect=True)
def test_the_last_token_is_the_last_word_piece(model):
    tokens = getattr(model.pipeline, model.tokenizer)
    for prompt, place in zip(["cat", "a cat"], model.last_token(["cat", "a cat"]).tolist(), strict=True):
        ids = tokens(prompt).input_ids
        assert tokens.convert_ids_to_tokens(ids[place]).startswith("t")
        assert set(ids[place + 1 :]) <= set(tokens.all_special_ids)
    assert model.last_token([""]).tolist() == [0]


def test_a_long_prompt_has_as_many_word_pieces_as_are_read(sd1):
    model = tiny.FAMILIES["sd1"].load(str(sd1), device="cpu")
    pieces = model.word_pieces(["x " * 60, "a cat", ""])
    assert [list(p) for p in pieces] == [list(range(1, 31)), [1, 2, 3, 4], []]


def test_the_states_of_each_text_encoder_follow_its_own_word_pieces(any_pipeline, model):
    """A token embedding changed in one encoder changes that one's states, at that place and nowhere before it."""
    prompts = ["a cat"]
    states = model.text_states(model.encode_prompts(prompts))
    assert bool(states) == (any_pipeline[0] != "dit")
    for name, own in states.items():
        embedded, last = model.embed(prompts), model.word_pieces(prompts, name)[0][-1]
        embedded.embeds[name][:, last + embedded.embeds[name].shape[1] - own.shape[1]] += 1
        after = model.text_states(model.encode_prompts(embedded))
        assert {n for n in states if not torch.equal(after[n], states[n])} == {name}
        changed = (after[name] != own).any(-1)[0]
        assert changed[last]
        bidirectional = "T5" in type(model.parts[name]).__name__
        assert changed[:last].any() == bidirectional


def test_images_survive_the_autoencoder_in_shape(any_pipeline, model):
    pictures = torch.rand(2, 3, *(32, 32) if any_pipeline[0] == "sana" else (16, 16))
    latents = model.encode_images(pictures)
    assert latents.shape == (2, *model.latent_shape)
    assert model.decode(latents).shape == pictures.shape


def blocks(model) -> list[str]:
    """The layers with an output for every position of the image."""
    names = [name for name, _ in model.denoiser.named_modules()]
    return [n for n in names if re.fullmatch(r"(single_)?transformer_blocks\.\d+", n)] or ["mid_block"]


@pytest.mark.parametrize("place", [(0, 3), (2, 1)])
@pytest.mark.parametrize("as_many_words_as_places", [False, True])
def test_features_are_those_of_their_place(model, place, as_many_words_as_places):
    c, x, t = model.encode_prompts(["a cat"]), model.noise([0]), torch.tensor(500)
    if as_many_words_as_places:
        words = (model.latent_shape[-1] // model.patch) ** 2
        c = Conditioning(
            c.embeds[:, :words], {k: v[:, :words] if v.shape[1] == c.embeds.shape[1] else v for k, v in c.extra.items()}
        )
    quarter = model.latent_shape[-1] // 4
    row, column = (slice(i * quarter, (i + 1) * quarter) for i in place)
    planted = x.clone()
    planted[..., row, column] = 5 * model.noise([1])[..., row, column]
    assert model.middle in blocks(model)
    for layer in blocks(model):
        changed = (model.features(planted, t, c, layer) - model.features(x, t, c, layer)).norm(dim=1)[0]
        assert changed.shape == (changed.shape[0],) * 2 and changed.shape[0] >= 4
        found = [4 * i // changed.shape[0] for i in divmod(int(changed.argmax()), changed.shape[1])]
        spread = model.component == "unet"  # whose random convolutions move it by one
        assert max(abs(i - j) for i, j in zip(found, place, strict=True)) <= spread
    assert not any(module._forward_hooks for module in model.denoiser.modules())


@pytest.mark.parametrize("any_pipeline", [f for f in tiny.FAMILIES if f != "dit"], indirect=True)  # always square
@pytest.mark.parametrize(("size", "place"), [((6, 8), (0, 3)), ((8, 6), (3, 0))])
def test_features_of_an_image_that_is_not_square_are_those_of_their_place(model, size, place):
    c, x, t = model.encode_prompts(["a cat"]), torch.randn(1, model.latent_shape[0], *size), torch.tensor(500)
    planted = x.clone()
    row, column = (slice(2 * i, 2 * i + 2) for i in place)
    planted[..., row, column] = 5 * torch.randn_like(x[..., row, column])
    for layer in blocks(model):
        changed = (model.features(planted, t, c, layer) - model.features(x, t, c, layer)).norm(dim=1)[0]
        assert changed.shape in (size, (size[0] // 2, size[1] // 2))
        at = divmod(int(changed.argmax()), changed.shape[1])
        found = [i * side // n // 2 for i, n, side in zip(at, changed.shape, size, strict=True)]
        spread = model.component == "unet"
        assert max(abs(i - j) for i, j in zip(found, place, strict=True)) <= spread


@pytest.fixture(scope="module")
def shallow(tmp_path_factory) -> str:
    """The folder of a pipeline whose UNet has attention in the middle only, so that it is soon compiled."""
    torch.manual_seed(0)
    pipeline, folder = tiny.sd1(), tmp_path_factory.mktemp("shallow")
    levels = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    pipeline.unet = UNet2DConditionModel.from_config({**pipeline.unet.config, **levels})
    pipeline.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def compiled(shallow):
    """(a model whose denoiser was compiled by a first prediction, a list that grows with each run of its graph)."""
    model, ran = StableDiffusion.load(shallow, device="cpu", compile=True), []
    model.denoiser.compile(backend=lambda graph, _: lambda *arguments: ran.append(1) or graph(*arguments))
    with torch.no_grad():
        model.predict(model.noise([0, 0]), torch.tensor(500), model.encode_prompts(["a cat"] * 2))
    assert ran
    return model, ran


@torch.no_grad()
def test_features_are_those_of_the_layer_though_the_denoiser_be_compiled(shallow, compiled):
    model, ran = compiled
    c, x, t = model.encode_prompts(["a cat"] * 2), model.noise([0, 0]), torch.tensor(500)
    ran.clear()
    torch.testing.assert_close(model.features(x, t, c), StableDiffusion.load(shallow, device="cpu").features(x, t, c))
    assert not ran
    model.predict(x, t, c)
    assert ran, "and is compiled for all the rest"


@torch.no_grad()
def test_rows_get_their_own_share_of_side_modules_even_if_the_denoiser_was_compiled_before(compiled):
    model, ran = compiled
    layer = "unet.mid_block.resnets.0.time_emb_proj"
    side = SideModules({layer: LowRank(model.layer(layer), rank=2)})
    for p in side.modules[layer].parameters():
        nn.init.normal_(p)
    c, x, t = model.encode_prompts(["a cat"] * 2), model.noise([0, 0]), torch.tensor(500)
    before = model.predict(x, t, c)
    with side.attached_to(model, "side"):
        whole = model.predict(x, t, c)
        ran.clear()
        mixed = model.predict(x, t, c.with_gains({"side": torch.tensor([0.0, 1.0])}))
        assert ran, "they are compiled too"
        assert torch.equal(model.without("side").predict(x, t, c), before)
    assert torch.equal(model.predict(x, t, c), before)
    torch.testing.assert_close(mixed, torch.stack([before[0], whole[1]]))
    assert not torch.allclose(before, whole)


@pytest.mark.parametrize("place", [(0, 3), (3, 0)])
def test_a_patch_planted_in_images_lights_up_its_place_in_the_mask(model, place):
    """The prototype comes from the patch in four images; the masks are for four others, with other noise."""
    torch.manual_seed(0)
    side = model.decode(torch.zeros(1, *model.latent_shape)).shape[-1]
    row, column = (slice(i * side // 4, (i + 1) * side // 4) for i in place)
    plain = (0.5 + 0.1 * torch.rand(8, 1, 1, 1) + 0.02 * torch.randn(8, 3, side, side)).clamp(0, 1)
    planted = plain.clone()
    planted[..., row, column] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]
    c, t = model.encode_prompts([""]).expand(8), torch.full((8,), 1)

    def noised(pictures):
        z_0 = model.encode_images(pictures)
        return model.add_noise(z_0, torch.randn_like(z_0), t)

    centre, f = model.features(noised(plain), t, c).mean((0, 2, 3)), model.features(noised(planted), t, c)
    i, j = (p * f.shape[-1] // 4 + f.shape[-1] // 8 for p in place)
    prototype = F.normalize(f[:4, :, i, j].mean(0) - centre, dim=0)
    prototypes = Prototypes(prototype[None], prototype[:0], centre, tau=0.5, alpha=15.0)
    M = prototypes.mask(prototypes.similarities(model, noised(planted), t, c).amax(1), (side, side))[4:]
    assert M[..., row, column].mean() > 2 * M.mean()


def test_outputs_without_spatial_positions_are_not_features(model):
    c, x, t = model.encode_prompts(["a cat"]), model.noise([0]), torch.tensor(500)
    silent = (*dict(model.text_projections()), "linear_1", "norm_q")  # Flux's last: heads and width are no grid
    silent = [n for n, _ in model.denoiser.named_modules() if n.endswith(silent)]
    for layer in [*silent, model.middle.partition(".")[0] if "." in model.middle else "up_blocks", "no_such_layer"]:
        with pytest.raises(UserError, match=layer):
            model.features(x, t, c, layer)
    assert silent and not any(module._forward_hooks for module in model.denoiser.modules())


def test_a_student_learns_and_its_erasure_comes_and_goes(model, attention):
    c, x, t = model.encode_prompts(["a cat"]), model.noise([0]), torch.tensor([500])
    before = model.predict(x, t, c)
    with Weights(attention).of(model) as lesson, torch.enable_grad():
        target = before - 0.1
        optimizer = torch.optim.Adam(lesson.parameters.values(), lr=1e-3)
        losses = []
        for _ in range(2):
            losses.append(F.mse_loss(lesson.student.predict(x, t, c), target))
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[1] < losses[0]
        learned, erasure = model.predict(x, t, c).detach(), lesson.erasure()
    assert torch.equal(model.predict(x, t, c), before)
    with erasure.applied_to(model):
        assert torch.equal(model.predict(x, t, c), learned) and not torch.equal(learned, before)
    assert torch.equal(model.predict(x, t, c), before)


def test_a_student_saves_and_loads_as_diffusers_does(model, attention, tmp_path):
    with Weights(attention).of(model) as lesson:
        with torch.no_grad():
            for p in lesson.parameters.values():
                p.add_(0.1 * torch.randn_like(p))
        erasure = lesson.erasure()
    with erasure.applied_to(model):
        model.pipeline.save_pretrained(tmp_path)
        student = {name: p.clone() for name, p in model.denoiser.state_dict().items()}
    again = getattr(DiffusionPipeline.from_pretrained(tmp_path), model.component).state_dict()
    assert student.keys() == again.keys() and all(torch.equal(p, again[name]) for name, p in student.items())
    c, x, t = model.encode_prompts(["a cat"]), model.noise([0]), torch.tensor(500)
    loaded = type(model).load(str(tmp_path), device="cpu").predict(x, t, c)
    assert not torch.equal(loaded, model.predict(x, t, c))
    with erasure.applied_to(model):
        assert torch.equal(loaded, model.predict(x, t, c))


def test_a_fingerprint_tells_weights_apart(sd1, tmp_path):
    loaded = StableDiffusion.load(str(sd1), device="cpu")
    assert loaded.fingerprint == StableDiffusion.load(str(sd1), device="cpu").fingerprint
    pipeline = DiffusionPipeline.from_pretrained(sd1)
    with torch.no_grad():
        pipeline.unet.conv_in.weight[0, 0, 0, 0] += 1
    pipeline.save_pretrained(tmp_path)
    assert StableDiffusion.load(str(tmp_path), device="cpu").fingerprint != loaded.fingerprint


def test_a_fingerprint_is_of_all_that_is_in_a_file_which_is_read_once(tmp_path, monkeypatch):
    weights = {f"layer{i}": torch.zeros(2**18) for i in range(5)}  # a MiB each
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        save_file(weights, tmp_path / name / "model.safetensors")
        weights["layer2"][2**17] = 1
    before = fingerprint(tmp_path / "before")
    assert fingerprint(tmp_path / "after") != before
    monkeypatch.setattr("hashlib.file_digest", None)  # to call it would be an error
    assert fingerprint(tmp_path / "before") == before


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/nowhere/model.ckpt", "pickled checkpoint"),
        ("/nowhere/model", "no model folder"),
        (".", "model_index.json"),
        ("nobody/nothing-of-this-name", "hf download"),
    ],
)
def test_a_path_without_a_model_gives_advice(path, says):
    with pytest.raises(UserError, match=says):
        StableDiffusion.load(path)


@pytest.mark.parametrize("file", ["unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"])
def test_a_pipeline_that_lacks_a_weight_is_refused(sd1, tmp_path, file):
    folder = shutil.copytree(sd1, tmp_path / "model")
    name = tiny.lose_a_weight(folder / f"{file}.safetensors")
    with pytest.raises(UserError, match=rf"{folder / file.partition('/')[0]} .*{re.escape(name)}"):
        StableDiffusion.load(str(folder), device="cpu")

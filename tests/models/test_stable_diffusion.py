"""Every family through its own YAML, with a tiny random pipeline in the place of the real weights."""

import pytest
import torch
from diffusers import DiffusionPipeline
from hydra.utils import instantiate

from tests.composed import config
from unlearning.concepts import UserError
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.sampler import Sampler

YAML = {"sd1": ["emoji_unet", "sd14", "sd15"], "sd2": ["sd21"], "sdxl": ["sdxl"], "sd3": ["sd3"]}


@pytest.fixture(scope="module")
def model(any_pipeline, tmp_path_factory):
    family, folder = any_pipeline
    cfg = config(
        tmp_path_factory.mktemp("x"), f"model={YAML[family][-1]}", f"model.path={folder}", "model.dtype=float32"
    )
    return instantiate(cfg.model)


def test_every_yaml_of_a_family_loads_a_folder(any_pipeline, tmp_path):
    family, folder = any_pipeline
    for name in YAML[family]:
        cfg = config(
            tmp_path, f"model={name}", f"model.path={folder}", "model.dtype=bfloat16", "model.attention_slicing=true"
        )
        loaded = instantiate(cfg.model)
        assert loaded.dtype == torch.bfloat16
        assert Sampler(steps=2)(loaded, ["a cat"], [0]).isfinite().all()


def test_pictures_are_those_of_diffusers_own_pipeline(model):
    seeds, prompts = [3, 4], ["a cat", "a dog"]
    ours = Sampler(steps=4, guidance_scale=5.0)(model, prompts, seeds)
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    theirs = model.pipeline(
        prompts, num_inference_steps=4, guidance_scale=5.0, generator=generators, output_type="pt",
        height=16, width=16,
    ).images  # fmt: skip
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)


def test_a_batch_is_its_pictures_one_by_one(model):
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
        torch.testing.assert_close(x_t, model.scheduler.add_noise(x_0, eps, t))
        v_prediction = model.prediction_type == "v_prediction"
        target = model.scheduler.get_velocity(x_0, eps, t) if v_prediction else eps
    torch.testing.assert_close(model.to_x0(target, x_t, t), x_0, atol=1e-4, rtol=1e-3)


def test_a_snapshot_keeps_the_weights_of_its_day_and_shares_the_rest(model):
    names = [n for n, _ in model.denoiser.named_parameters() if "attn2" in n or ".add_" in n]
    c, x, t = model.encode_prompts(["a cat"]), model.noise([0]), torch.tensor(500)
    before, teacher = model.predict(x, t, c), model.snapshot(names)
    parameters = dict(model.denoiser.named_parameters())
    try:
        for name in names:
            parameters[name].add_(0.3)
        assert not torch.equal(model.predict(x, t, c), before)
        torch.testing.assert_close(teacher.predict(x, t, c), before, atol=1e-6, rtol=0)
        assert teacher.denoiser is model.denoiser
    finally:
        for name in names:
            parameters[name].copy_(teacher.weights[name])


def test_text_projections_are_where_the_prompt_enters(model):
    projections = dict(model.text_projections())
    assert projections and all(
        m.in_features == model.encode_prompts([""]).embeds.shape[-1] for m in projections.values()
    )
    assert all(f"{name}.weight" in dict(model.denoiser.named_parameters()) for name in projections)


def test_the_last_token_is_the_last_word_piece(model):
    ids = model.pipeline.tokenizer("cat").input_ids
    assert model.last_token(["cat", "a cat"]).tolist() == [len(ids) - 2, len(ids) - 1]


def test_images_survive_the_autoencoder_in_shape(model):
    latents = model.encode_images(torch.rand(2, 3, 16, 16))
    assert latents.shape == (2, *model.latent_shape)
    assert model.decode(latents).shape == (2, 3, 16, 16)


def test_a_fingerprint_tells_weights_apart(sd1, tmp_path):
    loaded = StableDiffusion.load(str(sd1), device="cpu")
    assert loaded.fingerprint == StableDiffusion.load(str(sd1), device="cpu").fingerprint
    pipeline = DiffusionPipeline.from_pretrained(sd1)
    with torch.no_grad():
        pipeline.unet.conv_in.weight[0, 0, 0, 0] += 1
    pipeline.save_pretrained(tmp_path)
    assert StableDiffusion.load(str(tmp_path), device="cpu").fingerprint != loaded.fingerprint


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/nowhere/model.ckpt", "pickled checkpoint"),
        ("/nowhere/model", "no model folder"),
        (".", "model_index.json"),
        ("nobody/nothing-of-this-name", "hf download"),
    ],
)
def test_a_path_that_holds_no_model_is_answered_with_what_to_do(path, says):
    with pytest.raises(UserError, match=says):
        StableDiffusion.load(path)

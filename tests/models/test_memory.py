"""Settings that save memory do not change results, for tiny random pipelines."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn

from tests import tiny
from tests.tiny import FAMILIES
from unlearning.models.diffusion import at_once
from unlearning.models.stable_diffusion_xl import StableDiffusionXL
from unlearning.sampling.inversion import invert
from unlearning.training.student import LoRA, Weights


@pytest.mark.parametrize("any_pipeline", ["sd1", "sana"], indirect=True)  # two kinds of autoencoder
def test_of_large_images_the_autoencoder_is_shown_a_few_at_a_time(any_model, monkeypatch):
    model = any_model
    images = torch.rand(5, 3, *model.decode(torch.zeros(1, *model.latent_shape)).shape[-2:])
    whole = model.encode_images(images)
    monkeypatch.setattr("unlearning.models.stable_diffusion.AT_ONCE", 2 * images[0, 0].numel())
    seen, encode, decode = [], model.vae.encode, model.vae.decode
    monkeypatch.setattr(model.vae, "encode", lambda x: seen.append(len(x)) or encode(x))
    monkeypatch.setattr(model.vae, "decode", lambda x: seen.append(len(x)) or decode(x))
    torch.testing.assert_close(model.encode_images(images), whole, atol=1e-4, rtol=1e-4)
    assert len(model.decode(whole)) == 5 and seen == [2, 2, 1] * 2


@pytest.mark.parametrize(("side", "calls"), [(16, [16, 4]), (64, [16, 4]), (128, [4] * 5), (512, [1] * 20)])
def test_the_larger_latents_are_the_fewer_are_in_a_call(side, calls):
    latents = torch.empty(1, 1, 1, 1).expand(20, 4, side, side)
    assert [len(few) for few in latents.split(at_once(latents, 16))] == calls


@pytest.mark.parametrize("any_pipeline", ["sd1", "sd3", "dit"], indirect=True)
def test_gradients_are_the_same_though_layers_be_worked_out_again(any_pipeline):
    family, folder = any_pipeline

    def gradients(again: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = FAMILIES[family].load(str(folder), device="cpu", gradient_checkpointing=again)
        with Weights(".").of(model) as lesson:
            assert model.denoiser.is_gradient_checkpointing == again
            x_t, c = torch.randn(2, *model.latent_shape), model.encode_prompts(["a cat", ""])
            S = lesson.student.predict(x_t, torch.tensor([300, 600]), c)
            with torch.no_grad():
                T = lesson.teacher.predict(x_t, torch.tensor([300, 600]), c)
            (S - T - 1).square().mean().backward()
            return [p.grad for p in lesson.parameters.values() if p.grad is not None]

    kept, found = gradients(False), gradients(True)
    assert len(found) == len(kept) > 10
    for ours, theirs in zip(found, kept, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("any_pipeline", ["sd1", "sd3"], indirect=True)
def test_an_embedding_is_inverted_under_a_teacher_whose_layers_are_not_worked_out_again(any_pipeline):
    """Its weights, or its want of an adapter, are its own on the way there alone."""
    family, folder = any_pipeline
    for student in (Weights("."), LoRA("to_k|to_v")):
        found = []
        for again in (False, True):
            torch.manual_seed(0)
            model = FAMILIES[family].load(str(folder), device="cpu", gradient_checkpointing=again)
            with student.of(model) as lesson:
                teacher, z_t = lesson.teacher, torch.randn(1, *model.latent_shape)
                c = teacher.encode_prompts([""])
                v = nn.Parameter(c.embeds.clone())

                def loss(teacher=teacher, z_t=z_t, c=c, v=v) -> torch.Tensor:
                    return teacher.predict(z_t, torch.tensor(500), replace(c, embeds=v)).square().mean()

                invert(teacher, [v], loss, optimizer=partial(torch.optim.Adam, lr=0.02), iterations=2)
                found.append(v.detach())
                assert model.denoiser.is_gradient_checkpointing == again
        torch.testing.assert_close(*found, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("upcast", "kept"), [(True, torch.float32), (False, torch.float16)])
def test_an_autoencoder_that_overflows_in_float16_is_not_in_it(tmp_path, upcast, kept):
    pipeline = tiny.pipeline("sdxl")
    pipeline.vae.register_to_config(force_upcast=upcast)
    pipeline.save_pretrained(tmp_path)
    model = StableDiffusionXL.load(str(tmp_path), device="cpu", dtype="float16")
    assert model.vae.dtype == kept and model.dtype == torch.float16
    assert model.encode_images(torch.rand(1, 3, 16, 16)).dtype == torch.float32
    model.autocast, computed = torch.float16, []
    model.vae.decoder.conv_in.register_forward_hook(lambda _, __, output: computed.append(output.dtype))
    model.decode(torch.zeros(1, *model.latent_shape))
    assert computed == [kept]

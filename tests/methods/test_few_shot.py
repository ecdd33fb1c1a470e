"""Few-shot unlearning's theorems (arXiv:2405.07288): ascent on the denoising loss, by the text encoder alone."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch

from tests import tiny
from unlearning.concepts import Concept, UnlearningTask
from unlearning.data.generated import Generated
from unlearning.errors import UserError
from unlearning.methods.few_shot import TEMPLATES, FewShot, MLPsAndLastAttention
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.sampler import Sampler

TASK = UnlearningTask(erase=(Concept("cat"),))


@pytest.fixture(scope="module")
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


@pytest.fixture
def make(tmp_path):
    def of(*, iterations=2, lr=1e-2, **settings) -> FewShot:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
        return FewShot(
            generated=Generated(str(tmp_path), Sampler(steps=2)),
            student=MLPsAndLastAttention(),
            iterations=iterations,
            batch_size=2,
            optimizer=partial(torch.optim.Adam, lr=lr),
            trainer=partial(pl.Trainer, enable_model_summary=False, **quiet),
            **settings,
        )

    return of


def test_the_loss_is_minus_that_of_denoising_with_the_concepts_prompts(model, make):
    method = make(templates=["one {}"])
    method.student = method.teacher = model
    method.task, x_0 = TASK, torch.randn(2, *model.latent_shape)
    torch.manual_seed(7)
    loss = method.loss({"forget": (x_0, torch.tensor([0, 0]))})
    torch.manual_seed(7)
    torch.randint(1, (2,))
    t, eps = model.timesteps(torch.rand(2)), torch.randn_like(x_0)
    predicted = model.predict(model.add_noise(x_0, eps, t), t, model.encode_prompts(["one cat"] * 2))
    torch.testing.assert_close(loss, -(predicted - eps).pow(2).mean(), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("latents", ["drawn", "noise"])
def test_training_increases_the_denoising_error_for_the_concept(model, make, latents):
    torch.manual_seed(0)
    patch = make(iterations=30, lr=3e-2, latents=latents, templates=["a {}"]).fit(model, TASK)
    x_0, t = torch.randn(64, *model.latent_shape), torch.randint(1000, (64,))
    eps = torch.randn_like(x_0)

    def error():
        c = model.encode_prompts(["a cat"] * 64)
        return (model.predict(model.add_noise(x_0, eps, t), t, c) - eps).pow(2).mean()

    before = error()
    with patch.applied_to(model):
        assert error() > before


@pytest.mark.parametrize("family", ["sd1", "sdxl", "sd3"])
def test_mlps_of_all_clip_layers_and_the_last_self_attention_move_and_nothing_else(family, make, tmp_path):
    model = tiny.FAMILIES[family].load(str(tiny.save(family, tmp_path)), device="cpu")
    with MLPsAndLastAttention().of(model) as pair:
        names = set(pair.parameters)
    clip = {
        n for n in model.named_parameters() if n.startswith(("text_encoder.", "text_encoder_2.")) and ".layers." in n
    }
    assert names == {n for n in clip if ".mlp." in n or ".self_attn." in n}, "the tiny encoders have one layer"
    patch = make().fit(model, TASK)
    assert patch.weights.keys() == names and any((patch.weights[n] != model.named_parameters()[n]).any() for n in names)


def test_of_several_layers_only_the_last_ones_attention_moves(sd1):
    model = StableDiffusion.load(str(sd1), device="cpu")
    layers = model.named_modules()["text_encoder.encoder.layers"]
    layers.extend([type(layers[0])(model.parts["text_encoder"].config) for _ in range(11)])
    with MLPsAndLastAttention().of(model) as pair:
        attending = {n.split(".layers.")[1].split(".")[0] for n in pair.parameters if ".self_attn." in n}
        assert attending == {"11"} and sum(".mlp.fc1.weight" in n for n in pair.parameters) == 12


def test_templates_of_an_object_and_of_a_style_name_it_once():
    assert all(
        template.count("{}") == 1 and len(set(own)) == len(own) for own in TEMPLATES.values() for template in own
    )
    assert all("style of {}" in template for template in TEMPLATES["style"])


def test_a_model_without_clip_is_refused(make, tmp_path):
    model = tiny.FAMILIES["pixart"].load(str(tiny.save("pixart", tmp_path)), device="cpu")
    with pytest.raises(UserError, match="CLIP"):
        make().fit(model, TASK)

"""Forget-Me-Not's theorems (arXiv:2303.17591): the attention in the loss, and that training reduces it."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch

from tests import tiny
from unlearning.concepts import Concept, UnlearningTask
from unlearning.data.generated import Generated
from unlearning.errors import UserError
from unlearning.methods.fmn import FMN, attention_norm
from unlearning.models.attention import concept_places, text_attention_maps
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.sampler import Sampler
from unlearning.training.student import Weights

TASK = UnlearningTask(erase=(Concept("cat"),))


@pytest.fixture(scope="module")
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


@pytest.fixture
def make(tmp_path):
    def of(*, iterations=2, lr=1e-2, parameters=r"^(unet|transformer)\.", **settings) -> FMN:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
        return FMN(
            generated=Generated(str(tmp_path), Sampler(steps=2)),
            count=2,
            student=Weights(parameters),
            iterations=iterations,
            optimizer=partial(torch.optim.AdamW, lr=lr),
            trainer=partial(pl.Trainer, enable_model_summary=False, **quiet),
            **settings,
        )

    return of


def attention(model, prompt, word, batch=4):
    """The mean attention to a word of a prompt, and to all other tokens."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, *model.latent_shape, generator=generator)
    with torch.no_grad(), text_attention_maps(model) as maps:
        model.predict(x, torch.full((batch,), 500), model.encode_prompts([prompt] * batch))
    places = concept_places(model, [prompt], [word])[0]
    mean = torch.stack([calls[0].float().mean((0, 1, 2)) for calls in maps.values()]).mean(0)
    return mean[places].sum(), mean[~places].sum()


def test_the_norm_is_of_the_chosen_tokens_in_all_layers_and_of_nothing_else():
    a, b = torch.rand(2, 3, 4, 5), torch.rand(2, 1, 9, 5)
    places = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 0, 1, 1]]).bool()
    squares = sum(A[0, :, :, 1:3].square().sum() + A[1, :, :, 3:].square().sum() for A in (a, b))
    torch.testing.assert_close(attention_norm({"a": [a], "b": [b]}, places), squares.sqrt())


@pytest.mark.parametrize("family", ["sd1", "sd3"])
def test_training_takes_attention_away_from_the_concepts_tokens(family, make, tmp_path):
    model = tiny.FAMILIES[family].load(str(tiny.save(family, tmp_path)), device="cpu")
    cat, others = attention(model, "a photo of cat", "cat")
    with make(iterations=8, lr=2e-2).fit(model, TASK).applied_to(model):
        now, others_now = attention(model, "a photo of cat", "cat")
    assert now < 0.8 * cat and now / cat < others_now / others


@pytest.mark.parametrize("pooler", [True, False])
def test_pooler_includes_the_end_of_the_text(model, make, pooler):
    method = make(pooler=pooler)
    method.fit(model, TASK)
    clip = concept_places(model, ["a photo of cat"], ["cat"])
    last = int(clip[0].nonzero().max())
    assert bool(method.places[0, last + 1]) == pooler and method.places.sum() == clip.sum() + pooler


def test_the_end_of_the_text_is_found_behind_words_after_the_name(model):
    clip, end = (
        concept_places(model, ["a cat image"], ["cat"], end=end)[0].nonzero().flatten() for end in (False, True)
    )
    assert clip.tolist() == [2, 3, 4] and end.tolist() == [2, 3, 4, 10], "a token for each letter"


def test_a_model_that_attends_to_no_text_is_refused_before_an_image_is_drawn(make, tmp_path):
    model = tiny.FAMILIES["pixart"].load(str(tiny.save("pixart", tmp_path)), device="cpu")
    with pytest.raises(UserError, match="attention"):
        make().fit(model, TASK)
    assert not list(tmp_path.rglob("*.png"))

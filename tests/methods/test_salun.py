"""SalUn's theorems (Fan et al., 2024): the mask selects the largest gradients; other weights stay bit-identical."""

from functools import partial

import pytest
import pytorch_lightning as pl
import torch

from unlearning.concepts import Concept, UnlearningTask
from unlearning.data.generated import Generated
from unlearning.errors import UserError
from unlearning.methods.regularisers import L2SP, SelFT
from unlearning.methods.salun import SalUn
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.sampler import Sampler
from unlearning.training.regulariser import largest
from unlearning.training.student import Weights

TASK = UnlearningTask(erase=(Concept("cat", anchor="forest"),), retain=(Concept("dog"), Concept("ship")))


@pytest.fixture(scope="module")
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


@pytest.fixture
def make(tmp_path):
    def of(*, iterations=3, optimizer=None, parameters="attn2", **settings) -> SalUn:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
        return SalUn(
            generated=Generated(str(tmp_path), Sampler(steps=2)),
            count=4,
            student=Weights(parameters),
            iterations=iterations,
            batch_size=2,
            optimizer=optimizer or partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1),
            trainer=partial(pl.Trainer, enable_model_summary=False, **quiet),
            **settings,
        )

    return of


def same(model, patch):
    """Which entries of each weight are bit-identical."""
    own = model.named_parameters()
    return {name: value == own[name] for name, value in patch.weights.items()}


@pytest.mark.parametrize(
    "optimizer",
    [partial(torch.optim.AdamW, lr=1e-2, weight_decay=0.1), partial(torch.optim.SGD, lr=1.0, momentum=0.9)],
)
@pytest.mark.parametrize("share", [0.5, 0.1])
def test_the_masked_half_stays_bit_identical_under_momentum_and_weight_decay(model, make, optimizer, share):
    kept = same(model, make(share=share, optimizer=optimizer).fit(model, TASK))
    moved = 1 - sum(int(k.sum()) for k in kept.values()) / sum(k.numel() for k in kept.values())
    assert 0.8 * share < moved <= share


def test_trained_entries_have_the_largest_summed_gradients(model, make):
    """With a saliency loss of known gradients, two batches of which partly cancel out."""

    class Known(SalUn):
        def saliency(self, batch):
            signs.append(1.0 if len(signs) % 2 else -0.25)
            return signs[-1] * sum((p * g[n]).sum() for n, p in self.pair.parameters.items())

    g = {n: torch.randn_like(p) for n, p in model.named_parameters().items() if "attn2" in n}
    signs, method = [], make(share=0.3)
    method.__class__ = Known
    kept = same(model, method.fit(model, TASK))
    assert len(signs) == 2, "one pass over four images, two at a time"
    masks = largest({n: v.abs() for n, v in g.items()}, 0.3)
    assert all(torch.equal(kept[n], ~mask) for n, mask in masks.items())


def test_the_saliency_is_of_the_guided_prediction(model, make):
    method = make(w=7.5)
    method.student = method.teacher = model
    method.c, x_0 = ["a cat"], torch.randn(2, *model.latent_shape)
    torch.manual_seed(7)
    loss = method.saliency({"forget": (x_0, torch.tensor([0, 0]))})
    torch.manual_seed(7)
    t, eps = model.timesteps(torch.rand(2)), torch.randn_like(x_0)
    eps_c, eps_0 = (
        model.predict(model.add_noise(x_0, eps, t), t, model.encode_prompts([p] * 2)) for p in ("a cat", "")
    )
    torch.testing.assert_close(loss, (8.5 * eps_c - 7.5 * eps_0 - eps).pow(2).mean(), atol=1e-4, rtol=1e-3)


def test_the_objective_relabels_the_concept_and_denoises_retained_images(model, make):
    method = make(alpha=0.5)
    method.student = method.teacher = model
    method.c, method.c_other, method.c_r = ["a cat"], ["a forest"], ["a dog", "a ship"]
    x, x_r = torch.randn(2, 2, *model.latent_shape)
    torch.manual_seed(7)
    loss = method.loss({"forget": (x, torch.tensor([0, 0])), "retain": (x_r, torch.tensor([1, 0]))})
    torch.manual_seed(7)
    t, eps = model.timesteps(torch.rand(2)), torch.randn_like(x)
    x_t = model.add_noise(x, eps, t)
    cat, forest = (model.predict(x_t, t, model.encode_prompts([p] * 2)) for p in ("a cat", "a forest"))
    t, eps = model.timesteps(torch.rand(2)), torch.randn_like(x)
    retained = model.predict(model.add_noise(x_r, eps, t), t, model.encode_prompts(["a ship", "a dog"]))
    expected = (cat - forest).pow(2).mean() + 0.5 * (retained - eps).pow(2).mean()
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-3)


def test_training_brings_the_concepts_prediction_to_the_anchors(model, make):
    adam = partial(torch.optim.Adam, lr=1e-2)
    patch = make(iterations=15, optimizer=adam, parameters=r"^unet\.", alpha=0.0).fit(model, TASK)
    c, anchor = (model.encode_prompts([TASK.prompt(name)] * 16) for name in ("cat", "forest"))
    x, t = torch.randn(16, *model.latent_shape), torch.randint(1000, (16,))
    before = (model.predict(x, t, c) - model.predict(x, t, anchor)).pow(2).mean()
    with patch.applied_to(model):
        after = (model.predict(x, t, c) - model.predict(x, t, anchor)).pow(2).mean()
    assert after < 0.5 * before


def test_a_concept_without_anchor_takes_the_first_to_retain_and_without_any_is_refused(model, make):
    method = make()
    method.fit(model, UnlearningTask(erase=(Concept("cat"),), retain=TASK.retain))
    assert method.c_other == ["a photo of the dog"]
    with pytest.raises(UserError, match=r"dataset\.anchor"):
        make().fit(model, UnlearningTask(erase=(Concept("cat"),)))


def test_a_penalty_fits_around_it_and_a_second_mask_does_not(model, make):
    make(regulariser=L2SP()).fit(model, TASK)
    with pytest.raises(UserError, match="mask"):
        make(regulariser=SelFT(batches=1)).fit(model, TASK)

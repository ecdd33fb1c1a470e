"""SPM (arXiv:2312.16145): a gate between 0 and 1, an adapter that starts as nothing, one adapter for each concept."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from safetensors.torch import load_file
from torch import nn

from tests import processes
from unlearning.concepts import Concept, UnlearningTask
from unlearning.erasures.composed import Composed, composed
from unlearning.erasures.module_edit import Gate
from unlearning.errors import UserError
from unlearning.methods.spm import SPM, FacilitatedTransport, SquaredTransport, anchors
from unlearning.models.conditioning import Conditioning
from unlearning.models.embeddings import Embedded
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.sampler import Sampler
from unlearning.training.student import LoRA

LAYERS = r"^unet\..*attentions\.\d+\.|^transformer\.(single_)?transformer_blocks\."
CAT, DOG = UnlearningTask(erase=(Concept("cat"),)), UnlearningTask(erase=(Concept("dog"),))
BOTH = UnlearningTask(erase=CAT.erase + DOG.erase)


@dataclass(frozen=True)
class Fixed(Gate):
    """The same gain for every prompt."""

    gain: float

    def __call__(self, model, text, c):
        return torch.full((len(c),), self.gain)


@pytest.fixture(scope="module")
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


def spm(*, iterations=3, lr=1e-2, lamb=1000.0, callbacks=None, **more) -> SPM:
    quiet = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu", "enable_model_summary": False}
    quiet |= {"callbacks": callbacks} if callbacks else {"enable_checkpointing": False}
    return SPM(
        **{"steps": 4, "iterations": iterations, "lamb": lamb, **more},
        student=LoRA(LAYERS, rank=1, alpha=1.0, convolutions=True, init="kaiming"),
        optimizer=partial(torch.optim.AdamW, lr=lr),
        trainer=partial(pl.Trainer, **quiet),
    )


@pytest.fixture(scope="module")
def cat(model):
    pl.seed_everything(0, verbose=False)
    return spm(iterations=2, lr=0.1).fit(model, CAT)


@pytest.fixture(scope="module")
def dog(model):
    pl.seed_everything(0, verbose=False)
    return spm(iterations=2, lr=0.1).fit(model, DOG)


@pytest.fixture
def predict(model):
    def call(prompts=("a cat", "a dog")):
        c = model.encode_prompts(prompts)
        return model.predict(model.noise(range(len(c))), torch.tensor([400]).expand(len(c)), c)

    return call


# --- facilitated transport --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("any_pipeline", ["sd1", "sdxl", "sd3", "sana"], indirect=True)
def test_gamma_is_one_for_the_concept_and_never_more_or_negative(any_model):
    gamma = FacilitatedTransport("cat")
    prompts = ["cat", "a cat and a dog", "dog", "", "an act"]
    gammas = gamma(any_model, prompts, any_model.encode_prompts(prompts))
    assert gammas.shape == (5,) and gammas[0] == 1
    assert (gammas >= 0).all() and (gammas <= 1).all()


def test_gamma_is_the_larger_of_cosine_and_share_of_tokens(model):
    """The tiny tokenizer has one piece a letter: "cot" holds two of the three of "cat"."""
    prompts = ["cot", "dog"]
    states = model.encode_prompts(["cat", *prompts]).embeds.flatten(1)
    cosine = torch.cosine_similarity(states[1:], states[:1])
    gammas = FacilitatedTransport("cat")(model, prompts, model.encode_prompts(prompts))
    torch.testing.assert_close(gammas, torch.maximum(cosine, torch.tensor([2 / 3, 0])).clamp(0, 1))


def test_the_released_code_scales_by_the_square(model):
    prompts = ["cat", "cot", "dog"]
    c = model.encode_prompts(prompts)
    gamma, squared = (gate("cat")(model, prompts, c) for gate in (FacilitatedTransport, SquaredTransport))
    torch.testing.assert_close(squared, gamma**2)
    assert squared[0] == 1 and (squared[1:] < gamma[1:]).all()
    assert isinstance(spm(iterations=1, squared=True).fit(model, CAT).gate, SquaredTransport)


def test_replaced_embeddings_are_judged_by_the_cosine_alone(model):
    gamma, prompts = FacilitatedTransport("cat"), ["cat", "cat"]
    own = model.embed(prompts)
    attacked = Embedded(own.prompts, {part: e.clone() for part, e in own.embeds.items()})
    for e in attacked.embeds.values():
        e[1] = torch.randn_like(e[1])
    c = model.encode_prompts(attacked)
    gammas = gamma(model, attacked, c)
    cosine = torch.cosine_similarity(c.embeds[1].flatten(), model.encode_prompts(["cat"]).embeds[0].flatten(), dim=0)
    assert gammas[0] == 1
    torch.testing.assert_close(gammas[1], cosine.clamp(0, 1))


def test_the_gate_of_an_applied_adapter_is_differentiable_in_token_embeddings(model, cat):
    text = model.embed(["dog"])
    text.embeds["text_encoder"].requires_grad_(True)
    with cat.applied_to(model):
        (gamma,) = model.encode(text).gains.values()
        gamma.sum().backward()
    assert text.embeds["text_encoder"].grad.any()


# --- the adapter ------------------------------------------------------------------------------------------------------


def test_it_is_beside_every_layer_of_the_transformer_blocks(model, cat):
    layers = {
        f"unet.{name}.{inner}"
        for name, block in model.denoiser.named_modules()
        if isinstance(block, Transformer2DModel)
        for inner, layer in block.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }
    assert {name.removesuffix(".lora_A.weight") for name in cat.weights if "lora_A" in name} == layers
    assert all(len(w) == 1 for name, w in cat.weights.items() if "lora_A" in name), "rank 1"
    assert any(w.ndim == 4 for w in cat.weights.values()), "convolutions too"


def test_a_new_adapter_is_the_identity_and_has_no_anchoring_loss(model, predict):
    method, before = spm(), predict()
    x_t, t, c = model.noise([1, 2]), torch.tensor([300, 700]), model.encode_prompts(["cat", "cat"])
    with method.moving.of(model) as pair:
        assert torch.equal(predict(), before)
        method.student, method.teacher = pair.student, pair.teacher
        assert method.anchoring(x_t, t, c) == 0
        for p in pair.parameters.values():
            nn.init.normal_(p)
        assert method.anchoring(x_t, t, c) > 0


def test_a_multiplier_of_zero_is_the_base_model_to_the_bit(model, cat, predict):
    before = predict()
    with replace(cat, gate=Fixed(0.0)).applied_to(model):
        assert torch.equal(predict(), before)
    with cat.applied_to(model):
        assert not torch.equal(predict(), before)


def test_each_prompt_gets_its_own_share(model, cat, predict):
    """A batch with gains 1 and 0: the first row equals the full adapter, the second equals the base model."""
    gates = {gain: replace(cat, gate=Fixed(gain)) for gain in (0.0, 1.0)}
    with cat.applied_to(model):
        own = model.encode_prompts(["cat", "dog"])
    assert [len(g) for g in own.gains.values()] == [2] and next(iter(own.gains.values()))[0] == 1
    before = predict()
    with gates[1.0].applied_to(model):
        name = next(iter(model.side))
        c = model.encode_prompts(["a cat", "a dog"]).with_gains({name: torch.tensor([1.0, 0.0])})
        mixed = model.predict(model.noise([0, 1]), torch.tensor([400, 400]), c)
        whole = predict()
    torch.testing.assert_close(mixed[0], whole[0], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(mixed[1], before[1], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(mixed[0], before[0], atol=1e-4)


# --- several concepts -------------------------------------------------------------------------------------------------


def test_a_training_on_top_of_a_gated_adapter_needs_no_layer_again(cat, sd1):
    """The gate holds in the forward pass alone, and gradient checkpointing would compute layers without it."""
    found = []
    for again in (False, True):
        fresh = StableDiffusion.load(str(sd1), device="cpu", gradient_checkpointing=again)
        with replace(cat, gate=Fixed(0.0)).applied_to(fresh):
            pl.seed_everything(0, verbose=False)
            found.append(spm(iterations=2, steps=1).fit(fresh, DOG).weights)
            assert fresh.denoiser.is_gradient_checkpointing == again
    for name, weight in found[0].items():
        torch.testing.assert_close(found[1][name], weight, atol=1e-6, rtol=1e-4)


def test_an_adapter_with_gain_zero_has_no_effect(model, cat, dog, predict):
    with replace(cat, gate=Fixed(1.0)).applied_to(model):
        alone = predict()
    with composed(replace(cat, gate=Fixed(1.0)), replace(dog, gate=Fixed(0.0))).applied_to(model):
        assert torch.equal(predict(), alone)


@pytest.mark.parametrize("trajectory", ["exact", "reuse"])
def test_every_concept_gets_the_adapter_that_it_gets_alone(model, trajectory):
    def fit(task):
        pl.seed_everything(3, verbose=False)
        return spm(iterations=1, trajectory=trajectory).fit(model, task)

    both = fit(BOTH)
    assert isinstance(both, Composed)
    assert [part.gate.concept for part in both.parts] == ["cat", "dog"]
    assert [part.digest for part in both.parts] == [fit(CAT).digest, fit(DOG).digest]


def test_an_interrupted_fit_resumes_with_the_concept_it_was_at(model, tmp_path):
    def keep():
        return [pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=1)]

    class Interrupted(SPM):
        broken, seen = True, ()

        def loss(self, prompts):
            if Interrupted.broken and prompts == ["dog"] and self.global_step == 1:
                Interrupted.broken = False
                raise RuntimeError("interrupted")
            Interrupted.seen += ((*prompts, self.global_step),)
            return super().loss(prompts)

    def fit(callbacks):
        pl.seed_everything(3, verbose=False)
        method = spm(iterations=2, callbacks=callbacks)
        method.__class__ = Interrupted
        return method.fit(model, BOTH)

    with pytest.raises(RuntimeError, match="interrupted"):
        fit(keep())
    again = fit(keep())
    assert Interrupted.seen == (("cat", 0), ("cat", 1), ("dog", 0), ("dog", 1))
    assert again.digest == fit(None).digest


# --- training ---------------------------------------------------------------------------------------------------------


def test_points_come_from_the_model_with_the_adapter_on_its_way_to_the_bare_name(model):
    method, asked = spm(iterations=1), []
    points = method.points

    class Spy(type(points)):
        def __call__(self, model, prompts):
            asked.append((model is method.student, list(prompts)))
            return super().__call__(model, prompts)

    points.__class__ = Spy
    method.fit(model, CAT)
    assert asked == [(True, ["cat"])]


def test_training_brings_the_concept_to_its_target_and_anchoring_holds_the_rest(model):
    c, null = model.encode_prompts(["cat"] * 16), model.encode_prompts([""] * 16)
    torch.manual_seed(1)
    x, t = torch.randn(16, *model.latent_shape), torch.randint(1000, (16,))
    target = 2 * model.predict(x, t, null) - model.predict(x, t, c)
    a = anchors(c)
    before, kept = model.predict(x, t, c), model.predict(x, t, a)

    def errors(lamb):
        pl.seed_everything(0, verbose=False)
        settings = {"trajectory": "reuse", "steps": 10, "batch_size": 4, "anchor_count": 4}
        with spm(iterations=20, lr=2e-2, lamb=lamb, **settings).fit(model, CAT).applied_to(model):
            concept = (model.predict(x, t, c) - target).pow(2).mean() / (before - target).pow(2).mean()
            return concept, (model.predict(x, t, a) - kept).pow(2).mean()

    (free, drift), (held, less) = errors(0.0), errors(1.0)
    assert free < 0.7 and held < 1
    assert less < 0.5 * drift


@pytest.mark.parametrize("any_pipeline", ["sd1", "sdxl", "sd3", "sana"], indirect=True)
def test_anchors_lie_around_the_concept_at_its_norm(any_model):
    torch.manual_seed(0)
    c = any_model.encode_prompts(["cat"]).expand(200)
    a = anchors(c)
    share = a.embeds.flatten(1).norm(dim=1) / c.embeds.flatten(1).norm(dim=1)
    assert share.min() >= 0.8 - 1e-4 and share.max() <= 1.2 + 1e-4 and share.std() > 0.05
    assert torch.cosine_similarity(a.embeds.flatten(1), c.embeds.flatten(1)).abs().max() < 0.9
    assert not any(a.prompts) and a.extra.keys() == c.extra.keys()
    any_model.predict(any_model.noise([0, 1]), torch.tensor([400, 400]), a[:2])


@pytest.mark.parametrize("count", [1, 4])
def test_the_released_code_anchors_half_at_the_null_prompt(model, count):
    method, asked = spm(null_anchors=True, anchor_count=count), []
    x_t, t, c = model.noise([1]), torch.tensor([300]), model.encode_prompts(["cat"])
    with method.moving.of(model) as pair:
        method.student, method.teacher = pair.student, pair.teacher
        hook = model.denoiser.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[2]))
        method.anchoring(x_t, t, c)
        hook.remove()
    null = (asked[0] == model.encode_prompts([""]).embeds).flatten(1).all(1)
    assert torch.equal(asked[0], asked[1]) and len(null) == count and null.sum() == (count + 1) // 2


def test_nearer_directions_are_accepted_less_often():
    """In the plane, P(angle) is in proportion to min(1, 1 - cos(angle)): the mean cosine is -pi / (4 pi - 4)."""
    torch.manual_seed(0)
    c = Conditioning(torch.tensor([[[1.0, 0.0]]])).expand(20_000)
    cosine = torch.cosine_similarity(anchors(c).embeds.flatten(1), c.embeds.flatten(1))
    assert cosine.mean().item() == pytest.approx(-torch.pi / (4 * torch.pi - 4), abs=0.02)


@pytest.mark.parametrize("any_pipeline", ["dit"], indirect=True)
def test_a_model_without_a_text_encoder_gives_an_error(any_model):
    with pytest.raises(UserError, match="no text"):
        spm().fit(any_model, CAT)


# --- on disk ----------------------------------------------------------------------------------------------------------

FRESH = """
import sys
from pathlib import Path
from safetensors.torch import save_file
from unlearning.erasures.base import Erasure
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.sampler import Sampler
base, erasure, out = sys.argv[1:]
model = StableDiffusion.load(base, device="cpu")
with Erasure.load(Path(erasure)).applied_to(model):
    save_file({"images": Sampler(steps=2)(model, ["a cat", "a dog"], [1, 2]).contiguous()}, out)
"""


def test_another_process_draws_the_same(sd1, model, cat, dog, tmp_path):
    both = composed(cat, dog)
    both.save(tmp_path / "erasure", base=model)
    with both.applied_to(model):
        ours = Sampler(steps=2)(model, ["a cat", "a dog"], [1, 2])
    out = tmp_path / "images.safetensors"
    processes.run(FRESH, [sd1, tmp_path / "erasure", out])
    torch.testing.assert_close(load_file(out)["images"], ours)

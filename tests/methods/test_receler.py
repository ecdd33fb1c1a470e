"""Receler's theorems (arXiv:2311.17717)."""

from functools import partial
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from tests import tiny
from unlearning.concepts import Concept, UnlearningTask
from unlearning.erasures.base import Erasure
from unlearning.errors import UserError
from unlearning.methods.receler import AdversarialVectors, BesideCrossAttention, Eraser, Receler, outside
from unlearning.models.attention import concept_mask, cross_attention, cross_attention_maps
from unlearning.models.stable_diffusion import StableDiffusion

TASK = UnlearningTask(erase=(Concept("cat"),))


@pytest.fixture(scope="module")
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


@pytest.fixture
def ask(model):
    x_t, t, c = model.noise([5, 6]), torch.tensor([400, 20]), model.encode_prompts(["a cat", "dog"])
    return lambda: model.predict(x_t, t, c)


def receler(*, iterations=2, lr=3e-4, rank=8, **more) -> Receler:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return Receler(
        **{"steps": 4, "inner_steps": 3, "vectors": 8, "iterations": iterations, **more},
        student=BesideCrossAttention(rank),
        optimizer=partial(torch.optim.Adam, lr=lr),
        trainer=partial(pl.Trainer, enable_model_summary=False, **quiet),
    )


# --- the erasers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_erasers_start_as_the_identity_beside_every_cross_attention_layer(family, tmp_path):
    model = tiny.FAMILIES[family].load(str(tiny.save(family, tmp_path)), device="cpu")
    x_t, t, c = model.noise([5]), torch.tensor([400]), model.encode_prompts(["a cat"])
    before = model.predict(x_t, t, c)
    with BesideCrossAttention(rank=4).of(model) as pair:
        assert torch.equal(pair.student.predict(x_t, t, c), before)
        assert {n.rsplit(".", 2)[0] for n in pair.parameters} == cross_attention(model).keys()
        with torch.no_grad():
            for p in pair.parameters.values():
                p.add_(0.1)
        assert not torch.allclose(pair.student.predict(x_t, t, c), before)
        assert torch.equal(pair.teacher.predict(x_t, t, c), before)
    with receler(iterations=1, lr=1e-2).fit(model, TASK).applied_to(model):
        assert not torch.allclose(model.predict(x_t, t, c), before)


def test_an_eraser_adds_to_the_output_of_its_layer_what_it_makes_of_it(model):
    name, layer = next(iter(cross_attention(model).items()))
    x, text = torch.randn(1, 16, layer.query_dim), torch.randn(1, 3, layer.cross_attention_dim)
    o = layer(x, text)
    with BesideCrossAttention(rank=4).of(model) as pair, torch.no_grad():
        weights = [pair.parameters[f"{name}.{own}"] for own in Eraser.names]
        for w in weights:
            w.normal_()
        down, down_bias, up, up_bias = weights
        inner = torch.nn.functional.gelu(o @ down.T + down_bias)
        torch.testing.assert_close(layer(x, text), o + inner @ up.T + up_bias)


def test_a_denoiser_without_a_unet_is_refused(tmp_path):
    model = tiny.FAMILIES["pixart"].load(str(tiny.save("pixart", tmp_path)), device="cpu")
    with pytest.raises(UserError, match="UNet"):
        receler().fit(model, TASK)


def test_only_the_erasers_move_and_the_erasure_comes_back_as_it_was_saved(model, ask, tmp_path):
    before, weights = ask(), {n: p.clone() for n, p in model.named_parameters().items()}
    erasure = receler(lr=1e-2).fit(model, TASK)
    assert all(torch.equal(p, weights[n]) and not p.requires_grad for n, p in model.named_parameters().items())
    assert not model.side and torch.equal(ask(), before)
    with erasure.applied_to(model):
        erased = ask()
        assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters().items())
    assert not torch.equal(erased, before) and torch.equal(ask(), before)
    erasure.save(tmp_path, base=model)
    generator = torch.get_rng_state()
    with Erasure.load(tmp_path).applied_to(model):
        assert torch.equal(ask(), erased)
    assert torch.equal(torch.get_rng_state(), generator), "applying an erasure draws no random numbers"


def test_plain_diffusers_uses_the_weights_as_the_readme_says(sd1, model, tmp_path, monkeypatch):
    receler(lr=1e-1).fit(model, TASK).save(tmp_path, base=model)
    monkeypatch.chdir(tmp_path)
    code = (tmp_path / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = code.replace(f"path/to/{Path(model.name).name}", model.name)  # which is the reader's to fill in
    there: dict = {}
    exec(code, there)
    c = model.encode_prompts(["a cat"])
    with Erasure.load(tmp_path).applied_to(model):
        expected = model.predict(model.noise([5]), torch.tensor([400]), c)
    torch.testing.assert_close(there["pipe"].unet(model.noise([5]), 400, c.embeds).sample, expected)


# --- the objective ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vectors", [0, 8])
def test_before_the_first_step_the_loss_is_guidance_away_from_the_concept(model, vectors):
    """Erasers of zero add nothing outside the mask; without adversarial vectors, eps_E is eps_c."""
    method = receler(eta=2.0, vectors=vectors, inner_steps=0)
    x_t, t, c = model.noise([5]), torch.tensor([400]), model.encode_prompts(["cat"])
    eps_c, eps_0 = model.predict(x_t, t, c), model.predict(x_t, t, model.encode_prompts([""]))
    with method.moving.of(model) as pair:
        method.student, method.teacher, method.task = pair.student, pair.teacher, TASK
        method.setup("fit")
        method.points = lambda model, prompts: (x_t, t, c)
        c_adv = method._adversary.overwritten(c, model.word_pieces(c.prompts))
        eps = model.predict(x_t, t, c_adv)
        torch.testing.assert_close(method.loss(["cat"]), (eps - eps_0 + 2 * (eps_c - eps_0)).pow(2).mean())
    assert torch.equal(eps, eps_c) == (vectors == 0)


def test_training_brings_the_concepts_prediction_to_the_target(model):
    torch.manual_seed(0)
    settings = {"trajectory": "reuse", "schedule": "diffusers", "steps": 10, "batch_size": 8, "vectors": 0}
    erasure = receler(iterations=25, lr=3e-2, beta=0.0, **settings).fit(model, TASK)
    c, null = model.encode_prompts(["cat"] * 16), model.encode_prompts([""] * 16)
    x, t = torch.randn(16, *model.latent_shape), torch.randint(1000, (16,))
    target = 2 * model.predict(x, t, null) - model.predict(x, t, c)
    before = (model.predict(x, t, c) - target).pow(2).mean()
    with erasure.applied_to(model):
        assert (model.predict(x, t, c) - target).pow(2).mean() < 0.5 * before


# --- adversarial prompt learning --------------------------------------------------------------------------------------


def test_adversarial_vectors_lie_behind_the_word_pieces(model):
    c = model.encode_prompts(["cat", "a dog"])
    words = model.word_pieces(c.prompts)
    adversary = AdversarialVectors(c, count=5, lr=0.1, weight_decay=0.1)
    c_adv = adversary.overwritten(c, words).embeds
    for states, own, prompt, edited in zip(c.embeds, words, c.prompts, c_adv, strict=True):
        assert torch.equal(edited[: own.stop], states[: own.stop])
        assert torch.equal(edited[own.stop : own.stop + 5], adversary.vectors[prompt])
        assert torch.equal(edited[own.stop + 5 :], states[own.stop + 5 :])


def test_a_text_without_room_for_the_vectors_gives_an_error(model):
    long = Concept("an old cat that sleeps on")
    with pytest.raises(UserError, match=r"method\.vectors"):
        receler(vectors=16).fit(model, UnlearningTask(erase=(long,)))


def test_steps_of_the_vectors_bring_the_prediction_closer_to_the_concepts_and_leave_the_erasers(model):
    x_t, t, c = model.noise([5]), torch.tensor([400]), model.encode_prompts(["cat"])
    words, eps_c = model.word_pieces(c.prompts), model.predict(x_t, t, c)
    adversary = AdversarialVectors(c, count=8, lr=0.2, weight_decay=0.0)
    with BesideCrossAttention(rank=4).of(model) as pair:
        distances = []
        for _ in range(15):
            eps = pair.student.predict(x_t, t, adversary.overwritten(c, words))
            distances.append((eps - eps_c).pow(2).mean())
            adversary.step(distances[-1])
        assert all(p.grad is None for p in pair.parameters.values())
    assert distances[-1] < 0.5 * distances[0]


def test_vectors_of_concepts_outside_the_batch_do_not_change(model):
    both, cat = model.encode_prompts(["cat", "dog"]), model.encode_prompts(["cat"])
    adversary = AdversarialVectors(both, count=4, lr=0.1, weight_decay=0.1)
    for c in (both, cat):  # Adam has momentum after the first
        before = {prompt: v.detach().clone() for prompt, v in adversary.vectors.items()}
        adversary.step(adversary.overwritten(c, model.word_pieces(c.prompts)).embeds.square().sum())
    assert torch.equal(adversary.vectors["dog"], before["dog"]) and not torch.equal(
        adversary.vectors["cat"], before["cat"]
    )


def test_an_interrupted_fit_resumes_with_the_same_vectors(model, tmp_path):
    def keep(folder):
        keeper = pl.callbacks.ModelCheckpoint(folder, save_last=True, save_top_k=0, every_n_train_steps=1)
        method = receler(iterations=4)
        method._make_trainer = partial(method._make_trainer, enable_checkpointing=True, callbacks=[keeper])
        return method

    class Interrupting(Receler):
        def loss(self, concepts):
            if self.global_step == 2 and not (tmp_path / "interrupted").exists():
                (tmp_path / "interrupted").touch()
                raise RuntimeError("interrupted")
            return super().loss(concepts)

    pl.seed_everything(7, verbose=False)
    whole = keep(tmp_path / "whole").fit(model, TASK)
    for _ in range(2):
        pl.seed_everything(7, verbose=False)
        method = keep(tmp_path / "parts")
        method.__class__ = Interrupting
        if not (tmp_path / "interrupted").exists():
            with pytest.raises(RuntimeError, match="interrupted"):
                method.fit(model, TASK)
    assert method.fit(model, TASK).digest == whole.digest


# --- concept-localised regularisation ---------------------------------------------------------------------------------


def test_a_mask_is_where_the_concepts_word_pieces_are_attended_to():
    """The layer of 4 by 4 places is the one nearest to 16 by 16; its token 1 is at place 5, half as much at 6."""
    attention = torch.zeros(1, 2, 16, 4)
    attention[..., 1] = 0.2
    attention[:, :, 5, 1], attention[:, :, 6, 1] = 1.0, 0.6
    attention[..., 3] = torch.rand(16)  # another token
    maps = {"far": torch.rand(1, 2, 4, 4), "near": attention}
    for threshold, places in ((0.1, {5, 6}), (0.9, {5}), (0.0, set(range(16)))):
        M = concept_mask(maps, [range(1, 2)], threshold)
        assert M.shape == (1, 1, 4, 4)
        assert set(M.flatten().nonzero().flatten().tolist()) == places


def test_every_row_of_a_batch_has_the_mask_of_its_own_words(model):
    prompts = ["cat", "dogs"]
    c, words = model.encode_prompts(prompts), model.word_pieces(prompts)
    with cross_attention_maps(model) as maps:
        model.predict(model.noise([1, 2]), torch.tensor(400), c)
        model.predict(model.noise([2]), torch.tensor(400), c[1:])
    both = concept_mask({n: calls[0] for n, calls in maps.items()}, words, 0.5)
    assert set(both.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(both[1:], concept_mask({n: calls[1] for n, calls in maps.items()}, words[1:], 0.5))


def test_only_what_an_eraser_adds_outside_the_mask_is_penalised():
    M = torch.tensor([[1.0, 0.0], [0.0, 0.0]])[None, None]
    E = torch.zeros(1, 16, 3)  # 4 by 4 places, of which the first quarter is the concept's
    E[0, [0, 1, 4, 5]] = 7.0
    assert outside(E, M) == 0
    E[0, 15] = 2.0
    torch.testing.assert_close(outside(E, M), torch.tensor(4.0 / 12))
    assert outside(E, torch.ones(1, 1, 2, 2)) == 0

"""STEREO's theorems (arXiv:2408.16807): the target of the second stage, and the model that each stage starts from."""

from functools import partial

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
import torch.nn.functional as F

from tests import tiny
from unlearning.attacks.cce import CCE
from unlearning.concepts import Concept, UnlearningTask
from unlearning.errors import UserError
from unlearning.methods.esd import ESD
from unlearning.methods.stereo import STEREO, AtOnce, Words
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.inversion import Placeholder, first_piece
from unlearning.training.student import Weights

TASK = UnlearningTask(erase=(Concept("cat", synonyms=("ox",)), Concept("dog", synonyms=("pup",))))
ONE = UnlearningTask(erase=(Concept("cat"),))


@pytest.fixture(scope="module")
def model(sd1):
    """One that takes the prompt seriously: the tiny one's output hardly depends on it."""
    model = StableDiffusion.load(str(sd1), device="cpu")
    with torch.no_grad():
        for name, m in model.text_projections():
            m.weight.mul_(20 if name.endswith("to_v") else 1)
    return model


def esd(kind=ESD, **settings):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return kind(**{
        "student": Weights("attn2"), "iterations": 2, "steps": 4, "template": "{}",
        "optimizer": partial(torch.optim.AdamW, lr=1e-2),
        "trainer": partial(pl.Trainer, enable_model_summary=False, **quiet), **settings,
    })  # fmt: skip


def images(model, prompts, count):
    side = model.decode(torch.zeros(1, *model.latent_shape)).shape[-1]
    return list(np.random.default_rng(0).integers(0, 255, (count, side, side, 3), dtype=np.uint8))


def stereo(*, search=None, erase=None, rounds=2) -> STEREO:
    inversion = CCE(
        images=images, optimizer=partial(torch.optim.AdamW, lr=0.05), count=2, initial="a", iterations=2, batch_size=1,
        accumulate=1, guided=False,
    )  # fmt: skip
    return STEREO(search=search or esd(), inversion=inversion, erase=erase or esd(AtOnce), rounds=rounds)


def before_training(model, task=TASK, **settings) -> AtOnce:
    method = esd(AtOnce, **settings)
    method.student, method.teacher, method.task = model, model.snapshot([]), task
    return method


# --- the compositional target -----------------------------------------------------------------------------------------


def test_the_target_leads_away_from_the_mean_of_a_concepts_words_and_towards_the_anchor(model):
    method = before_training(model, eta=3.0, anchor_scale=2.0, anchors=("the {} here",))
    x_t, t, prompts = model.noise([5, 6]), torch.tensor([400, 30]), ["ox", "dog"]

    def eps(*prompts):
        return model.predict(x_t, t, model.encode_prompts(prompts))

    eps_0, away = eps("", ""), (eps("cat", "dog") + eps("ox", "pup")) / 2
    target = eps_0 - 3 * (away - eps_0) + 2 * (eps("the cat here", "the dog here") - eps_0)
    loss = method.erasing(x_t, t, model.encode_prompts(prompts))
    assert loss > 1e-3
    torch.testing.assert_close(loss, F.mse_loss(eps(*prompts), target), atol=1e-6, rtol=1e-3)


def test_without_words_and_anchor_it_is_esd(model):
    x_t, t, c = model.noise([5]), torch.tensor([400]), model.encode_prompts(["cat"])
    method = before_training(model, ONE, eta=2.0, anchor_scale=0.0)
    expected = ESD.erasing(method, x_t, t, c)
    assert expected > 1e-3
    torch.testing.assert_close(method.erasing(x_t, t, c), expected, atol=1e-7, rtol=1e-3)


def test_the_projection_leaves_only_what_is_orthogonal_to_the_prediction():
    eps, eps_0 = torch.randn(2, 3, 4, 4, 4)
    for parallel in (0.0, 0.3, 1.0):
        update = esd(AtOnce, parallel=parallel).P(eps, eps_0)
        inner, whole = ((v * eps).flatten(1).sum(1) for v in (update, eps - eps_0))
        torch.testing.assert_close(inner, parallel * whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(update, eps - eps_0)  # parallel=1


# --- learned words ----------------------------------------------------------------------------------------------------


def test_a_learned_word_is_read_where_a_prompt_names_it_and_only_within_the_context(model):
    v = {"text_encoder": torch.randn(tiny.WIDTH)}
    prompts = ["a <cat 1> here", "a dog"]
    plain = model.encode_prompts(prompts)
    place = Placeholder.in_prompts(model, ["a {} here"])
    with Words({"<cat 1>": v}).known_to(model):
        c, teacher = model.encode_prompts(prompts), model.snapshot([])
    torch.testing.assert_close(c.embeds[:1], model.encode_prompts(place.filled(v)).embeds)
    assert torch.equal(c.embeds[1], plain.embeds[1]) and c.prompts == tuple(prompts)
    assert torch.equal(teacher.encode_prompts(prompts).embeds, c.embeds), "a snapshot knows what the model knew"
    assert torch.equal(model.encode_prompts(prompts).embeds, plain.embeds)


# --- the two stages ---------------------------------------------------------------------------------------------------


class Recorded(ESD):
    """Keeps what each fit erases, what of it the model reads, and the weights that it begins with."""

    def fit(self, model, task):
        names = [concept.name for concept in task.erase]
        now = {n: p.detach().clone() for n, p in model.named_parameters().items() if "attn2" in n}
        self.fits = [*getattr(self, "fits", []), (names, model.encode_prompts(names).embeds, now)]
        self.patches = [*getattr(self, "patches", []), super().fit(model, task)]
        return self.patches[-1]


class RecordedAtOnce(Recorded, AtOnce):
    def fit(self, model, task):
        self.words = [concept.words for concept in task.erase]
        return super().fit(model, task)


def test_each_round_erases_the_newest_words_from_the_model_of_the_round_before(model):
    method = stereo(search=esd(Recorded), rounds=3)
    words = method.searched(model, TASK)
    (first, *_), (second, embeds, start), (third, _, later) = method.search.fits
    assert first == ["cat", "dog"] and list(words) == first
    assert [second, third] == [[list(words[name])[k] for name in first] for k in (0, 1)]
    for begun, patch in ((start, method.search.patches[0]), (later, method.search.patches[1])):
        assert all(torch.equal(begun[name], value) for name, value in patch.weights.items())
    place = Placeholder.in_prompts(model, ["{}"])
    for name, word, row in zip(first, second, embeds, strict=True):
        torch.testing.assert_close(row, model.encode_prompts(place.filled(words[name][word])).embeds[0])
    learned = [v["text_encoder"] for own in words.values() for v in own.values()]
    assert len(learned) == 6 and not any(torch.equal(v, first_piece(model, "a")["text_encoder"]) for v in learned)


def test_the_second_stage_erases_all_words_from_the_model_as_it_was(model):
    """With a learning rate of 0 the erasure has the unedited weights: the first stage leaves no change."""
    erase = esd(RecordedAtOnce, optimizer=partial(torch.optim.SGD, lr=0.0))
    method = stereo(erase=erase)
    before = {n: p.detach().clone() for n, p in model.named_parameters().items()}
    erasure = method.fit(model, ONE)
    assert all(torch.equal(value, before[name]) for name, value in erasure.weights.items())
    [words] = erase.words
    assert words[0] == "cat" and len(set(words)) == 3
    assert not model.text_edits and all(torch.equal(p, before[n]) for n, p in model.named_parameters().items())


def test_a_second_fit_gives_the_same_result(model):
    digests = []
    for _ in range(2):
        pl.seed_everything(7, verbose=False)
        digests.append(stereo(rounds=1).fit(model, ONE).digest)
    assert digests[0] == digests[1]


def test_another_family_learns_a_word_for_each_of_its_encoders(tmp_path):
    model = tiny.FAMILIES["sd3"].load(str(tiny.save("sd3", tmp_path)), device="cpu")
    method = stereo(
        search=esd(student=Weights("attn")), erase=esd(AtOnce, student=Weights("attn"), iterations=1), rounds=1
    )
    [[v]] = [own.values() for own in method.searched(model, ONE).values()]
    assert v.keys() == set(model.text_encoders)
    assert not method.fit(model, ONE).empty


def test_a_model_that_reads_no_text_is_refused(tmp_path):
    model = tiny.FAMILIES["dit"].load(str(tiny.save("dit", tmp_path)), device="cpu")
    with pytest.raises(UserError):
        stereo(search=esd(student=Weights("attn"))).fit(model, UnlearningTask(erase=(Concept("tiger cat"),)))

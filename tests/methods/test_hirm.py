"""HiRM's theorems (arXiv:2602.19631)."""

import re
from functools import partial

import pytest
import pytorch_lightning as pl
import torch

from tests import processes, tiny
from unlearning.concepts import Concept, UnlearningTask
from unlearning.erasures.base import Erasure
from unlearning.erasures.composed import composed
from unlearning.erasures.weight_patch import WeightPatch
from unlearning.errors import UserError
from unlearning.methods.hirm import HiRM, random_unit_matrix, random_unit_vectors, states
from unlearning.training.student import Weights

FIRST = r"^text_encoder\w*\.(text_model\.)?encoder\.layers\.0\.(self_attn|mlp)\."
TASK = UnlearningTask(erase=(Concept("cat", anchor="animal"),))
RANDOM, SUPER = {"direction": "tokens", "c": 500.0}, {"direction": "anchor", "c": 1.0}


def hirm(*, lr=1e-3, epochs=10, **more) -> HiRM:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return HiRM(
        epochs=epochs,
        student=Weights(FIRST),
        optimizer=partial(torch.optim.AdamW, lr=lr, betas=(0.9, 0.98), eps=1e-6, weight_decay=1e-8),
        trainer=partial(pl.Trainer, enable_model_summary=False, **quiet),
        **more,
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Tiny models by family, loaded once."""
    folder = tmp_path_factory.mktemp("models")
    kinds = {family: tiny.FAMILIES[family] for family in ("sd1", "sdxl", "flux", "pixart", "dit")}
    return {f: kind.load(str(tiny.save(f, folder)), device="cpu") for f, kind in kinds.items()}


@pytest.fixture(scope="module")
def model(models):
    return models["sd1"]


def distances(model, targets):
    with torch.no_grad():
        return {part: float((h - targets[part]).norm()) for part, h in states(model, ["cat"]).items()}


@pytest.mark.parametrize(
    ("family", "towards"),
    [("sd1", RANDOM), ("sd1", SUPER), ("sd1", {"direction": "global", "c": 5000.0}), ("sdxl", RANDOM), ("flux", SUPER)],
)
def test_the_concepts_high_level_state_comes_closer_to_the_target_and_nothing_but_the_first_layer_moves(
    models, family, towards
):
    model, method = models[family], hirm(**towards)
    pl.seed_everything(3, verbose=False)
    method.seed, method.teacher, method.task = 3, model, TASK
    targets = {part: method.c * r for part, r in method.directions(["cat"]).items()}
    before, weights = distances(model, targets), {n: p.clone() for n, p in model.named_parameters().items()}
    patch = method.fit(model, TASK)
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters().items())
    assert {n.partition(".")[0] for n in patch.weights} == targets.keys()
    with patch.applied_to(model):
        after = distances(model, targets)
        moved = {n for n, p in model.named_parameters().items() if not torch.equal(p, weights[n])}
    assert all(after[part] < before[part] for part in targets)
    assert moved and all(re.search(FIRST, name) for name in moved)
    assert {n.partition(".")[0] for n in moved} == targets.keys(), "every CLIP encoder is edited"


def test_the_concept_is_encoded_as_its_super_category(model):
    target = states(model, ["animal"])
    before = distances(model, target)["text_encoder"]
    with hirm(**SUPER, epochs=50, lr=1e-2).fit(model, TASK).applied_to(model):
        assert distances(model, target)["text_encoder"] < 0.3 * before


def test_random_directions_are_of_unit_norm_and_a_function_of_the_seed():
    like = torch.empty(1, 7, 16)
    vectors, matrix = random_unit_vectors(like, 0), random_unit_matrix(like, 0)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(1, 7))
    torch.testing.assert_close(matrix.norm(), torch.tensor(1.0))
    assert (matrix >= 0).all() and (vectors < 0).any()
    for draw in (random_unit_vectors, random_unit_matrix):
        assert torch.equal(draw(like, 0), draw(like, 0)) and not torch.equal(draw(like, 0), draw(like, 1))


def test_pairs_lead_from_prompts_with_the_concept_to_prompts_without_it(model):
    method = hirm(direction="pairs", c=1.0, pairs=[["a nude man", "a man"], ["nudity", "clothes"]])
    method.teacher = model
    h = {p: states(model, [p])["text_encoder"] for p in ("a nude man", "a man", "nudity", "clothes")}
    expected = (h["a man"] - h["a nude man"] + h["clothes"] - h["nudity"]) / 2
    torch.testing.assert_close(method.directions(["nudity"])["text_encoder"], expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match=r"method\.pairs"):
        hirm(direction="pairs", c=1.0)


def test_an_epoch_has_one_step_for_every_concept(model):
    seen = []

    class Counting(HiRM):
        def loss(self, concepts):
            seen.append(concepts)
            return super().loss(concepts)

    method = hirm(**SUPER, epochs=2)
    method.__class__ = Counting
    method.fit(model, UnlearningTask(erase=(Concept("cat"), Concept("dog"))))
    assert seen == [["cat"], ["dog"]] * 2


@pytest.mark.parametrize("family", ["pixart", "dit"])
def test_a_model_without_a_clip_text_encoder_is_refused(models, family):
    with pytest.raises(UserError, match="CLIP"):
        hirm(**RANDOM).fit(models[family], TASK)


def test_it_composes_with_a_patch_of_the_unet(model):
    x_t, t, prompts = model.noise([5]), torch.tensor([400]), ["a cat"]

    def predicted():
        return model.predict(x_t, t, model.encode_prompts(prompts))

    name = "unet.conv_out.bias"
    patch, other = hirm(**RANDOM).fit(model, TASK), WeightPatch({name: model.named_parameters()[name] + 1})
    before = predicted()
    with patch.applied_to(model):
        edited = predicted()
    assert not torch.allclose(edited, before)
    for both in (composed(patch, other), composed(other, patch)):
        with both.applied_to(model):
            torch.testing.assert_close(predicted(), edited + 1)
        assert torch.equal(predicted(), before)


FRESH = """
import sys, torch
from pathlib import Path
from unlearning.erasures.base import Erasure
from unlearning.models.stable_diffusion import StableDiffusion

model = StableDiffusion.load(sys.argv[1], device="cpu")
with Erasure.load(Path(sys.argv[2])).applied_to(model):
    torch.save(model.encode_prompts(["a cat"]).embeds, sys.argv[3])
"""


def test_a_fresh_process_loads_the_erasure_and_encodes_as_this_one(sd1, tmp_path):
    model = tiny.FAMILIES["sd1"].load(str(sd1), device="cpu")
    before, patch = model.encode_prompts(["a cat"]).embeds, hirm(**RANDOM).fit(model, TASK)
    patch.save(tmp_path / "erasure", base=model)
    processes.run(FRESH, [sd1, tmp_path / "erasure", tmp_path / "c"])
    there = torch.load(tmp_path / "c", weights_only=True)
    with Erasure.load(tmp_path / "erasure").applied_to(model):
        torch.testing.assert_close(there, model.encode_prompts(["a cat"]).embeds)
    assert not torch.allclose(there, before)

"""MACE's theorems (Lu et al., 2024): both closed forms, the attention loss, and many concepts at once."""

from dataclasses import replace
from functools import partial

import pytest
import pytorch_lightning as pl
import torch

from unlearning.concepts import Concept, UnlearningTask
from unlearning.data.generated import Generated
from unlearning.erasures.module_edit import Adapter
from unlearning.errors import UserError
from unlearning.methods.closed_form import common_places
from unlearning.methods.mace import MACE
from unlearning.models.attention import attended, cross_attention_maps
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.sampler import Sampler
from unlearning.training.student import LoRA, Weights

TASK = UnlearningTask(erase=(Concept("cat", anchor="forest"), Concept("ship")), retain=(Concept("dog"), Concept("sea")))
KEYS_AND_VALUES = r"attn2\.to_(k|v)$"


@pytest.fixture(scope="module")
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


@pytest.fixture(scope="module")
def make(tmp_path_factory):
    store = tmp_path_factory.mktemp("store")

    def mace(*, iterations=2, lr=1e-2, student=None, **settings) -> MACE:
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
        return MACE(
            **{"generated": Generated(str(store), Sampler(steps=2)), "count": 3, "lamb": 1.0, **settings},
            student=student or LoRA(KEYS_AND_VALUES, rank=1, alpha=1.0),
            iterations=iterations,
            optimizer=partial(torch.optim.AdamW, lr=lr),
            trainer=partial(pl.Trainer, enable_model_summary=False, **quiet),
        )

    return mace


def maps(model) -> dict[str, torch.Tensor]:
    return {name: m.weight.detach().double() for name, m in model.text_projections()}


def adapter(model, seed: int) -> Adapter:
    torch.manual_seed(seed)
    weights = {}
    for name, W in maps(model).items():
        weights[f"{name}.lora_A.weight"], weights[f"{name}.lora_B.weight"] = torch.randn(1, 16), torch.randn(len(W), 1)
    return Adapter(weights)


# --- the closed forms -------------------------------------------------------------------------------------------------


def test_the_words_around_the_concept_act_like_those_around_its_anchor(model, make):
    method = make(templates=["a {} in it"], lamb=1e-4)
    task = UnlearningTask(erase=TASK.erase[:1])
    cat, forest = model.encode_prompts(["a cat in it", "a forest in it"]).embeds.double()
    places, anchors = [0, 1, *range(4, 29)], [0, 1, *range(7, 32)]  # start, "a"; the last "t", "in it", padding
    e, e_star = common_places(model, ["a cat in it"], ["a forest in it"])
    torch.testing.assert_close((e.double(), e_star.double()), (cat[places], forest[anchors]), atol=1e-5, rtol=0)
    refined = method.refined(model, task).weights
    for name, W in maps(model).items():
        before = (cat[places] - forest[anchors]) @ W.T
        after = cat[places] @ refined[f"{name}.weight"].double().T - forest[anchors] @ W.T
        assert after.norm() < 0.5 * before.norm()


@pytest.mark.parametrize("preserve_scale", [0.0, 0.5])
def test_the_fusion_is_the_minimiser(model, make, preserve_scale):
    method = make(templates=["{}", "a {}"], lamb=0.3, preserve_scale=preserve_scale)
    refined, adapters = method.refined(model, TASK), [adapter(model, 1), adapter(model, 2)]
    fused, own = method.fused(model, TASK, refined, adapters), maps(model)
    e = [model.encode_prompts([c.name, f"a {c.name}"]).embeds.flatten(0, 1).double() for c in TASK.erase]
    c_j = model.encode_prompts(["", "a photo of the dog", "a photo of the sea"]).embeds.flatten(0, 1).double()
    for name, W in own.items():
        W_1, W_2 = (patch.weights[f"{name}.weight"].double() for patch in (refined, fused))
        W_2.requires_grad_()
        loss = 0.3 * (W_2 - W_1).square().sum() + preserve_scale * (c_j @ (W_2 - W).T).square().sum()
        for states, lora in zip(e, adapters, strict=True):
            A, B = (lora.weights[f"{name}.lora_{which}.weight"].double() for which in "AB")
            loss = loss + (states @ (W_2 - W_1 - B @ A).T).square().sum()
        loss.backward()
        assert W_2.grad.norm() < 1e-4 * sum(states.square().sum() for states in e)


def test_the_refinement_is_the_minimiser_and_may_weigh_what_is_preserved_by_itself(model, make):
    settings = {"templates": ["a {} in it"], "lamb": 0.3, "preserve_scale": 0.5}
    old, new = (f"a {word} in it" for word in ("cat", "forest"))
    task = replace(TASK, erase=TASK.erase[:1])
    e, e_star = (states.double() for states in common_places(model, [old], [new]))
    c_j = model.encode_prompts(["", "a photo of the dog", "a photo of the sea"]).embeds.flatten(0, 1).double()
    for refine_scale, s_p in ((None, 0.5), (0.25, 0.25)):
        refined = make(**settings, refine_scale=refine_scale).refined(model, task).weights
        for name, W in maps(model).items():
            W_1 = refined[f"{name}.weight"].double().requires_grad_()
            loss = (e @ W_1.T - e_star @ W.T).square().sum() + 0.3 * (W_1 - W).square().sum()
            (loss + s_p * (c_j @ (W_1 - W).T).square().sum()).backward()
            assert W_1.grad.norm() < 1e-4 * (e.square().sum() + c_j.square().sum())


def test_the_fusion_of_one_lora_with_itself_is_that_lora(model, make):
    method, one = make(lamb=1e-6, templates=["{}", "a {}", "the {}"]), adapter(model, 1)
    refined = method.refined(model, TASK)
    fused = method.fused(model, TASK, refined, [one, one]).weights
    e = model.encode_prompts(["a cat"]).embeds[0].double()
    for name in maps(model):
        A, B = (one.weights[f"{name}.lora_{which}.weight"].double() for which in "AB")
        expected = e @ (refined.weights[f"{name}.weight"].double() + B @ A).T
        torch.testing.assert_close(e @ fused[f"{name}.weight"].double().T, expected, atol=1e-2, rtol=0)


def test_a_large_lamb_leaves_the_model_as_it_was(model, make):
    for name, weight in make(lamb=1e12).fit(model, TASK).weights.items():
        torch.testing.assert_close(weight, model.named_parameters()[name].detach(), atol=1e-5, rtol=0)


# --- the training -----------------------------------------------------------------------------------------------------


def test_attention_is_summed_within_the_mask_and_at_the_words():
    torch.manual_seed(0)
    A = torch.rand(2, 3, 16, 5)
    M, words = torch.zeros(2, 1, 2, 2), torch.zeros(2, 5)
    M[0, 0, 0, 1] = 1
    words[:, 3] = 1
    quarter = [2, 3, 6, 7]  # the upper right of 4 by 4 places
    torch.testing.assert_close(attended(A, M, words)[0], A[0, :, quarter, 3].norm())
    assert attended(A, M, words)[1] < 1e-6
    torch.testing.assert_close(attended(A, torch.ones(2, 1, 1, 1), torch.ones(2, 5)), A.flatten(1).norm(dim=1))


def test_the_words_of_a_concept_are_found_within_a_prompt(model):
    assert model.pieces_of("cat", ["a cat at sea", "cat", "no such"]) == [range(2, 5), range(1, 4), range(1, 7)]


def test_masks_are_of_the_unedited_model_and_styles_have_none(model, make):
    x_0, M = make().images(model, TASK, TASK.erase[0])
    assert len(x_0) == len(M) == 3 and set(M.unique().tolist()) == {0.0, 1.0}
    _, loose = make(mask_threshold=0.01).images(model, TASK, TASK.erase[0])
    assert M.sum() < loose.sum()
    assert make(kind="style").images(model, TASK, TASK.erase[0])[1].all()
    style = replace(TASK, kind="style")
    assert make().images(model, style, TASK.erase[0])[1].all() and make().prompts(style, "q") != make().prompts(
        TASK, "q"
    )


def test_training_takes_the_concepts_attention_away(model, make):
    method = make(iterations=30, lr=0.2, templates=["a {}"])
    task = UnlearningTask(erase=TASK.erase[:1])
    x_0, M = method.images(model, task, task.erase[0])
    t, words = torch.full((3,), 300), torch.zeros(3, 32)
    words[:, 2:5] = words[:, 5:] = 1

    def attention(erasure) -> float:
        with torch.no_grad(), erasure.applied_to(model), cross_attention_maps(model) as recorded:
            model.predict(x_0, t, model.encode_prompts(["a cat"]).expand(3))
        return sum(attended(calls[-1], M, words).mean().item() for calls in recorded.values())

    pl.seed_everything(0, verbose=False)
    assert attention(method.fit(model, task)) < 0.98 * attention(method.refined(model, task))


def test_timesteps_are_drawn_between_200_and_400_or_uniformly(model, make):
    torch.manual_seed(0)
    for focal, low, high in ((True, 0.5, 0.9), (False, 0.15, 0.25)):
        method = make(focal=focal)
        method.teacher = model
        t = method.timesteps(2000)
        share = ((t >= 200) & (t < 400)).float().mean()
        assert low < share < high and t.min() >= 0 and t.max() < 1000


def test_each_concept_has_a_lora_of_its_own_and_the_model_is_left_as_it_was(model, make):
    before = {name: p.clone() for name, p in model.named_parameters().items()}
    seen = []

    class Watched(MACE):
        def fused(self, model, task, refined, adapters):
            seen.extend(adapters)
            return super().fused(model, task, refined, adapters)

    method = make()
    method.__class__ = Watched
    weights = method.fit(model, TASK).weights
    assert len(seen) == 2 and seen[0].digest != seen[1].digest
    assert weights.keys() == {f"{name}.weight" for name in maps(model)}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters().items())
    with method.fit(model, TASK).applied_to(model):
        assert not torch.equal(model.named_parameters()[next(iter(weights))], before[next(iter(weights))])


@pytest.mark.parametrize("any_pipeline", ["sdxl", "sd3"], indirect=True)
def test_models_without_a_unet_are_refused(make, any_pipeline, any_model):
    if any_pipeline[0] == "sdxl":
        assert make(iterations=1).fit(any_model, TASK).weights
    else:
        with pytest.raises(UserError, match="no UNet"):
            make().fit(any_model, TASK)


def test_weights_of_the_model_are_no_student_of_it(model, make):
    with pytest.raises(UserError, match="LoRA"):
        make(student=Weights(r"attn2\.to_k")).fit(model, TASK)

"""The scrubber's algebra for every kind of prediction, its losses, and its fit from images to an erasure."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from PIL import Image

from tests.composed import config
from tests.tiny import FAMILIES, shrunk
from unlearning.erasures.module_edit import Adapter
from unlearning.erasures.weight_patch import WeightPatch
from unlearning.errors import UserError
from unlearning.models.conditioning import Conditioning
from unlearning.scrubbing.conditioning import ConditioningRows
from unlearning.store.images import figure_paths

SMALL = [
    "method.prototypes.K=4", "method.prototypes.purity=0", "method.prototypes.draws=1", "method.conditioning=null",
    "method.iterations=3", "method.batch_size=4", "dataset.pictures=6", "trainer.enable_progress_bar=false",
    "method.prototypes.layer=null", "trainer.accelerator=cpu",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(any_pipeline):
    family, folder = any_pipeline
    return FAMILIES[family].load(str(folder), device="cpu")


of_sd1 = pytest.mark.parametrize("any_pipeline", ["sd1"], indirect=True)
of_each_prediction = pytest.mark.parametrize("any_pipeline", ["sd1", "sd2", "sd3", "dit"], indirect=True)


@pytest.fixture
def scrub(tmp_path):
    """scrub(*overrides) -> (a Scrubber, its task), on images of cats."""

    def make(*overrides: str):
        cfg = config(tmp_path, "method=scrubber", "student@method.student=full", "concept=cat", *SMALL, *overrides)
        return instantiate(cfg.method, trainer=instantiate(cfg.trainer)), instantiate(cfg.dataset)

    return make


def blinded(model):
    """(z_t, z_blind_t, t, M (z_0 - eta)) with the same noise."""
    torch.manual_seed(0)
    z_0, eta, eps = torch.randn(3, 2, *model.latent_shape).unbind()
    M, t = torch.rand(2, 1, *model.latent_shape[1:]), torch.tensor([150, 700])
    change = M * (z_0 - eta)
    return model.add_noise(z_0, eps, t), model.add_noise(z_0 - change, eps, t), t, change


@of_each_prediction
def test_the_raw_target_leaves_the_concept_in_the_implied_x_0(model):
    z_t, z_blind_t, t, change = blinded(model)
    T_blind = torch.randn_like(z_t)
    implied, wanted = (model.to_x0(T_blind, z, t) for z in (z_t, z_blind_t))
    alpha, sigma = model._alpha_sigma(t)
    kept = {"epsilon": 1.0, "v_prediction": alpha**2, "flow": 1 - sigma}[model.prediction_type] * change
    torch.testing.assert_close(implied, wanted + kept, atol=1e-4, rtol=1e-4)


@of_each_prediction
def test_the_corrected_target_is_the_raw_one_plus_the_change_of_the_input(model):
    z_t, z_blind_t, t, _ = blinded(model)
    T_blind, (alpha, sigma) = torch.randn_like(z_t), model._alpha_sigma(t)
    by_hand = T_blind + (z_t - z_blind_t) * (alpha if model.prediction_type == "v_prediction" else 1) / sigma
    by_x0 = model.to_prediction(model.to_x0(T_blind, z_blind_t, t), z_t, t)
    torch.testing.assert_close(by_x0, by_hand, atol=1e-4, rtol=1e-4)


@of_each_prediction
def test_the_loss_is_zero_at_its_target_only(model, scrub):
    z_t, z_blind_t, t, _ = blinded(model)
    T_blind = torch.randn_like(z_t)
    corrected = model.to_prediction(model.to_x0(T_blind, z_blind_t, t), z_t, t)
    for space, target, other in (("x0", corrected, T_blind), ("raw", T_blind, corrected)):
        method, _ = scrub(f"method.target_space={space}")
        method.teacher = model
        assert method._error(target, z_t, T_blind, z_blind_t, t).max() < 1e-6
        assert method._error(other, z_t, T_blind, z_blind_t, t).mean() > 1e-3


@of_each_prediction
def test_errors_have_the_same_weight_at_every_timestep_up_to_a_limit(model, scrub):
    method, _ = scrub()
    method.teacher = model
    z, t = torch.randn(3, *model.latent_shape), torch.tensor([1, 500, 700])
    x_0, off = torch.randn(2, *z.shape).unbind()
    S, T = model.to_prediction(x_0, z, t), model.to_prediction(x_0 + off, z, t)
    torch.testing.assert_close(method._error(S, z, T, z, t), off.square(), atol=1e-2, rtol=1e-2)
    last = torch.full((3,), 999)
    assert method._error(z + 1, z, z, z, last).max() < 215, "DiT's schedule would give 24,000"


@of_each_prediction
def test_normalised_l_f_is_relative_to_the_amount_to_forget(model, scrub):
    z_0, off, null = *torch.randn(2, 2, *model.latent_shape), model.encode_prompts([""])
    M = torch.zeros(2, 1, *model.latent_shape[1:])
    M[:, :, :2, :2] = 1

    class Off:
        def predict(self, *asked):
            return model.predict(*asked) + 1

    def left(covered, change, *overrides, student=model):
        torch.manual_seed(0)
        method, _ = scrub("method.blinding=shuffled", "method.lamb_b=0", "method.lamb_r=0", *overrides)
        method.student, method.teacher, method.rows = student, model, ConditioningRows(null, null, null)
        return method.loss({"forget": (z_0, covered, z_0 + change * off)}).item()

    for covered in (M, M / 2):
        assert left(covered, 0.1) == left(covered, 1.0) == pytest.approx(1), "the teacher has forgotten nothing"
    assert left(M, 1e-3, student=Off()) == pytest.approx(1), "no more than 1, if there is almost nothing to forget"
    assert left(M, 0.1, "method.normalised=false") < 0.1 * left(M, 1.0, "method.normalised=false")


@of_each_prediction
def test_a_student_equal_to_the_teacher_has_a_loss_for_the_concept_only(model, scrub):
    torch.manual_seed(0)
    method, _ = scrub("method.blinding=shuffled", "method.lamb_b=1", "method.lamb_r=1")
    null = model.encode_prompts([""])
    method.student = method.teacher = model
    method.rows = ConditioningRows(null, null, null)
    z_0, nowhere = torch.randn(2, *model.latent_shape), torch.zeros(2, 1, *model.latent_shape[1:])
    assert method.loss({"forget": (z_0, nowhere, torch.zeros_like(z_0)), "retain": (z_0,)}) < 1e-10
    assert method.loss({"forget": (z_0, nowhere + 1, torch.zeros_like(z_0)), "retain": (z_0,)}) > 1e-4


@of_sd1
def test_the_teacher_gets_the_null_prompt_and_the_student_its_conditioning(model, scrub):
    seen = {"student": [], "teacher": []}

    def recording(who):
        class View:
            def __getattr__(self, name):
                return getattr(model, name)

            def predict(self, x_t, t, c: Conditioning):
                seen[who].append(c.embeds)
                return model.predict(x_t, t, c)

        return View()

    method, _ = scrub("method.lamb_r=0", "method.blinding=shuffled")
    method.student, method.teacher = recording("student"), recording("teacher")
    null, cat = model.encode_prompts([""]), model.encode_prompts(["cat"])
    method.rows = ConditioningRows(null, cat, null)
    z_0 = torch.randn(2, *model.latent_shape)
    method.loss({"forget": (z_0, torch.ones(2, 1, *z_0.shape[2:]), torch.zeros_like(z_0))})
    *targets, yardstick = seen["teacher"]
    assert [torch.equal(c, null.expand(2).embeds) for c in targets] == [True, True]
    assert torch.equal(yardstick, cat.expand(2).embeds), "the share of L_f compares with the same conditioning"
    assert [torch.equal(c, cat.expand(2).embeds) for c in seen["student"]] == [True]


def test_a_fit_lowers_the_loss_and_leaves_every_family_as_it_was(model, scrub):
    """On one batch with one noise, and a mask of ones."""
    method, task = scrub("method.iterations=3", "method.optimizer.lr=1e-5", "method.blinding=shuffled")
    losses, loss = [], method.loss

    def repeated(batch):
        torch.manual_seed(7)
        z_0, M, eta = (x[:1] for x in batch["forget"])
        losses.append(loss({"forget": (z_0, torch.ones_like(M), torch.zeros_like(eta)), "retain": (-z_0,)}))
        return losses[-1]

    method.loss, task = repeated, shrunk(task, model)
    one = task.forget_images[0]
    before = {k: v.detach().clone() for k, v in model.named_parameters().items()}
    erasure = method.fit(model, replace(task, forget_images=[one] * 4, retain_images=[255 - one] * 4))
    assert losses[0] > losses[1] > losses[-1]
    assert isinstance(erasure, WeightPatch) and set(erasure.weights) <= set(before)
    assert any(not torch.equal(v, before[k]) for k, v in erasure.weights.items())
    assert all(torch.equal(v, before[k]) for k, v in model.named_parameters().items())
    assert {"masks of forget images", "similarity to the nearest prototype"} <= set(method.figures)


@pytest.mark.parametrize("any_pipeline", ["sd1", "sd3"], indirect=True)
def test_masks_and_noise_can_be_new_at_every_step_and_a_lora_student_gives_an_adapter(model, scrub):
    method, task = scrub("method.blinding=gaussian", "method.detect=every_step", "student@method.student=lora")
    erasure = method.fit(model, shrunk(task, model))
    assert isinstance(erasure, Adapter) and any(v.any() for k, v in erasure.weights.items() if "lora_B" in k)


def test_float16_without_gradient_scaling_is_refused(sd1, scrub):
    method, task = scrub()
    model = FAMILIES["sd1"].load(str(sd1), device="cpu", autocast="float16")
    with pytest.raises(UserError, match=r"model\.autocast=bfloat16"):
        method.fit(model, shrunk(task, model))


@of_sd1
@pytest.mark.parametrize(
    ("images", "says"),
    [
        (lambda forget, retain: ([], retain), "forget="),
        (lambda forget, retain: (forget, forget[::-1]), "6 of the 6"),
        (lambda forget, retain: (forget[:3], [*retain, *forget]), "3 of the 12"),
    ],
)
def test_unusable_training_images_are_refused(model, scrub, images, says):
    method, task = scrub()
    forget, retain = images(task.forget_images[:], task.retain_images[:])
    with pytest.raises(UserError, match=says):
        method.fit(model, replace(task, forget_images=forget, retain_images=retain))


def test_an_unknown_setting_is_refused_with_the_known_ones(error_of):
    message = error_of("method=scrubber", "method.conditioning=v")
    assert "conditioning" in message and "caption" in message


@pytest.fixture
def photographs(tmp_path) -> list[str]:
    """A dataset of two folders of four images of noise."""
    for i, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)):
        folder = tmp_path / ("cats", "others")[i % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return ["dataset=folder", f"forget={tmp_path}/cats", f"retain={tmp_path}/others", "dataset.size=16"]


@pytest.mark.parametrize("settings", [["method=scrubber", "method.iterations=2"], ["method=words_solve"]])
def test_a_folder_of_photographs_goes_through_all_stages(unlearn, photographs, settings):
    """The search chooses among words given by hand; no image has a label."""
    run = unlearn(
        *photographs, *settings, "method.words=[cat,dog,key]", "method.prototypes.K=2", "method.prototypes.purity=0",
        "method.prototypes.layer=null", "evaluator=lpips",
    )  # fmt: skip
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["efficacy/lpips_e"] > 0 and (run / "erasure" / "weights.safetensors").exists()
    assert (run / "report.html").exists() and (run / "teaser.png").exists()


def test_the_figures_are_in_the_report_and_on_the_dashboard(unlearn, monkeypatch, tmp_path, photographs):
    """The caption of the prototypes says how many of them the figure leaves out."""
    for place in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(place, str(tmp_path / "wandb"))
    run = unlearn(
        *photographs, "method=scrubber", "method.conditioning=null", "method.iterations=1", "method.prototypes.K=40",
        "method.prototypes.purity=0", "logger=wandb",
    )  # fmt: skip
    saved = sorted((run / "figures").glob("*.png"))
    assert len(saved) == 5 and np.mean([p.stat().st_size for p in saved]) > 2000
    assert "patches most similar to" in (run / "report.html").read_text()
    captions = figure_paths(run)
    assert len(captions) == 5 and "patches most similar to 32 of 40 prototypes" in captions
    [media] = run.rglob("files/media/images")
    kept = {path.name.rpartition("_")[0].rpartition("_")[0]: path for path in media.glob("*.png")}
    for caption, path in captions.items():
        assert np.array_equal(Image.open(kept[caption]), Image.open(path))

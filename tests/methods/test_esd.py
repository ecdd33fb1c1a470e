"""ESD's theorems (Gandikota et al., 2023, eq. 6)."""

import gc
import re
import weakref
from functools import partial

import pytest
import pytorch_lightning as pl
import torch
from diffusers import UNet2DConditionModel

from tests.composed import config
from unlearning.concepts import Concept, UnlearningTask
from unlearning.errors import UserError
from unlearning.methods.esd import ESD
from unlearning.methods.stages import Stages
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.training.student import Weights

ESD_X, ESD_U = "attn2", r"^unet\.(?!.*attn2)(?!time_embedding)(?!conv_norm_out)(?!conv_out)"


@pytest.fixture(scope="module")
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


def esd(
    *, iterations=2, lr=1e-2, parameters=ESD_X, eta=1.0, steps=4, trajectory="exact", batch_size=1,
    trajectory_model="student", template=None, **trainer,
) -> ESD:  # fmt: skip
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return ESD(
        eta=eta,
        trajectory=trajectory,
        steps=steps,
        trajectory_model=trajectory_model,
        template=template,
        batch_size=batch_size,
        student=Weights(parameters),
        iterations=iterations,
        optimizer=partial(torch.optim.Adam, lr=lr),
        trainer=partial(pl.Trainer, enable_model_summary=False, **{**quiet, **trainer}),
    )


TASK = UnlearningTask(erase=(Concept("cat"),))


@pytest.mark.parametrize(
    ("choice", "tensors"),
    [
        (["method=esd_x"], 80),
        (["method=esd_u"], 598),
        (["method=esd_u", r"method.student.parameters='^unet\.(?!.*attn2)(?!.*norm)'"], 388),
    ],
)
def test_as_many_tensors_of_stable_diffusion_are_trained_as_by_the_authors_scripts(tmp_path, choice, tensors):
    with torch.device("meta"):  # a UNet without memory
        unet = UNet2DConditionModel(cross_attention_dim=768)
    parameters = config(tmp_path, *choice).method.student.parameters
    assert sum(bool(re.search(parameters, f"unet.{name}")) for name, _ in unet.named_parameters()) == tensors


def test_the_target_is_guidance_away_from_the_concept(model):
    """With the student still the teacher, the loss is || (1 + eta) (eps_c - eps_0) ||^2."""
    method = esd(eta=2.0)
    method.student, method.teacher = model, model.snapshot([])
    x_t, t, c = model.noise([5]), torch.tensor([400]), model.encode_prompts(["a photo of the cat"])
    method.points = lambda model, prompts: (x_t, t, c)
    eps_c, eps_0 = model.predict(x_t, t, c), model.predict(x_t, t, model.encode_prompts([""]))
    expected = (3 * (eps_c - eps_0)).pow(2).mean()
    torch.testing.assert_close(method.loss(["a photo of the cat"]), expected, atol=1e-6, rtol=1e-3)


def test_the_authors_script_calls_eta_plus_one_negative_guidance(model):
    method = esd(eta=1.5)
    method.student, method.teacher = model, model.snapshot([])
    x_t, t, c = model.noise([5]), torch.tensor([400]), model.encode_prompts(["a photo of the cat"])
    eps_c, eps_0 = model.predict(x_t, t, c), model.predict(x_t, t, model.encode_prompts([""]))
    target = eps_c - (1.5 + 1) * (eps_c - eps_0)
    torch.testing.assert_close(method.erasing(x_t, t, c), (eps_c - target).pow(2).mean(), atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("drawn_by", ["student", "teacher"])
def test_trajectories_are_the_students_or_the_frozen_teachers(model, drawn_by):
    method, models = esd(trajectory_model=drawn_by, template="{}"), []
    draw = method.points.__call__

    def points(model, prompts):
        assert prompts == ["cat"], "the bare name"
        models.append(model)
        return draw(model, prompts)

    points.restore = points.state = lambda *_: []
    method.points = points
    method.fit(model, TASK)
    assert len(models) == 2 and all((drawn is model) == (drawn_by == "student") for drawn in models)


def test_the_authors_esd_u_is_a_regular_expression(model):
    """All linear maps and convolutions outside of cross-attention."""
    layers = {name: m for name, m in model.named_modules().items() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
    theirs = {f"{n}.{p}" for n, m in layers.items() for p in dict(m.named_parameters()) if n.startswith("unet")}
    theirs = {name for name in theirs if "attn2" not in name}
    with Weights(r"^unet\.(?!.*attn2)(?!.*norm)").of(model) as pair:
        assert set(pair.parameters) == theirs


def test_training_brings_the_concepts_prediction_to_the_target(model):
    torch.manual_seed(0)
    patch = esd(iterations=25, lr=1e-2, trajectory="reuse", steps=10, batch_size=8).fit(model, TASK)
    c, null = model.encode_prompts(["a photo of the cat"] * 16), model.encode_prompts([""] * 16)
    x, t = torch.randn(16, *model.latent_shape), torch.randint(1000, (16,))
    target = model.predict(x, t, null) - (model.predict(x, t, c) - model.predict(x, t, null))
    before = (model.predict(x, t, c) - target).pow(2).mean()
    with patch.applied_to(model):
        after = (model.predict(x, t, c) - target).pow(2).mean()
    assert after < 0.5 * before


@pytest.mark.parametrize(("parameters", "crosses"), [(ESD_X, True), (ESD_U, False)])
def test_only_the_named_weights_move(model, parameters, crosses):
    patch = esd(parameters=parameters).fit(model, TASK)
    assert all(("attn2" in name) == crosses for name in patch.weights)
    if not crosses:
        assert not any(
            name.startswith(("unet.time_embedding", "unet.conv_out", "unet.conv_norm_out")) for name in patch.weights
        )
    own = model.named_parameters()
    assert any(not torch.equal(value, own[name]) for name, value in patch.weights.items())


def test_no_optimizer_outlives_the_fit_even_before_garbage_is_collected(model):
    made = []

    def adam(parameters):
        optimizer = torch.optim.Adam(parameters, lr=1e-3)
        made.append(weakref.ref(optimizer))
        return optimizer

    method = esd()
    method.make_optimizer = adam
    gc.disable()
    try:
        method.fit(model, TASK)
        assert made and made[0]() is None
    finally:
        gc.enable()


def test_a_pattern_without_a_match_gives_an_error(model):
    with pytest.raises(UserError, match="no_such_layer"):
        esd(parameters="no_such_layer").fit(model, TASK)


def test_a_loss_that_is_not_finite_stops_and_leaves_the_model_as_it_was(model):
    before = {k: v.clone() for k, v in model.denoiser.state_dict().items()}
    with pytest.raises(UserError, match="at step 1"):
        esd(lr=float("inf"), iterations=3).fit(model, TASK)
    assert all(torch.equal(v, before[k]) for k, v in model.denoiser.state_dict().items())


def test_training_is_deterministic_given_the_seed(model):
    patches = []
    for _ in range(2):
        pl.seed_everything(7, verbose=False)
        patches.append(esd().fit(model, TASK))
    assert patches[0].digest == patches[1].digest


def test_a_second_fit_takes_no_points_of_the_first(model):
    """Reuse keeps points in a pool, of which two iterations of a batch of two leave some."""
    settings = {"trajectory": "reuse", "batch_size": 2}
    method, patches = esd(**settings), []
    for fitting in (method, method, esd(**settings)):
        pl.seed_everything(7, verbose=False)
        patches.append(fitting.fit(model, TASK))
    assert patches[0].digest == patches[1].digest == patches[2].digest


def test_an_interrupted_fit_resumes_from_its_checkpoint(model, tmp_path):
    keeper = lambda: pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=1)  # noqa: E731

    class Interrupting(ESD):
        def loss(self, prompts):
            if self.global_step == 2 and not (tmp_path / "interrupted").exists():
                (tmp_path / "interrupted").touch()
                raise RuntimeError("interrupted")
            steps.append(self.global_step)
            return super().loss(prompts)

    steps = []
    with_checkpoints = {"enable_checkpointing": True, "iterations": 4}
    for attempt in range(2):
        method = esd(**with_checkpoints, callbacks=[keeper()])
        method.__class__ = Interrupting
        if attempt == 0:
            with pytest.raises(RuntimeError, match="interrupted"):
                method.fit(model, TASK)
        else:
            method.fit(model, TASK)
    assert steps == [0, 1, 2, 3]


def test_two_trained_stages_in_one_folder_each_run_their_own_steps(model, tmp_path):
    """Stages with equal settings, then another concept: no fit resumes from the checkpoint of another one."""
    steps = []

    class Counting(ESD):
        def loss(self, prompts):
            steps.append((prompts[0].split()[-1], self.global_step))
            return super().loss(prompts)

    def stage() -> ESD:
        keeper = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True, save_top_k=0, every_n_train_steps=1)
        method = esd(enable_checkpointing=True, callbacks=[keeper])
        method.__class__ = Counting
        return method

    for name in ("cat", "dog"):
        Stages({"first": stage(), "second": stage()}).fit(model, UnlearningTask(erase=(Concept(name),)))
    assert steps == [(name, step) for name in ("cat", "dog") for _ in range(2) for step in range(2)]


def test_the_denoiser_computes_in_the_trainers_precision(model):
    layer, computed = model.denoiser.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn2.to_q"), {}
    for precision in ("32-true", "bf16-mixed"):
        hook = layer.register_forward_hook(lambda _, __, output: computed.update({precision: output.dtype}))  # noqa: B023
        try:
            esd(iterations=1, precision=precision).fit(model, TASK)
        finally:
            hook.remove()
    assert computed == {"32-true": torch.float32, "bf16-mixed": torch.bfloat16}, "of the last call"


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_weights_are_not_trained_in_half_precision(model, precision):
    with pytest.raises(UserError, match=f"trainer.precision={precision.replace('true', 'mixed')}"):
        esd(precision=precision).fit(model, TASK)

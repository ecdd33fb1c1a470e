"""erase(pipe, concept, method=...): a pipeline in memory, on tiny models of every family."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from accelerate import cpu_offload
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline, PixArtAlphaPipeline, UNet2DModel

from tests import tiny
from unlearning import Erasure, erase
from unlearning.concepts import Concept, UnlearningTask
from unlearning.erasures.module_edit import Adapter
from unlearning.errors import UserError
from unlearning.methods.uce import UCE
from unlearning.models.families import as_model
from unlearning.sampling.sampler import Sampler
from unlearning.training.student import LoRA

ESD = {"method": "esd_x", "iterations": 1, "steps": 2, "optimizer": {"lr": 0.01}, "student": {"parameters": "attn"}}


def generated(pipe: DiffusionPipeline, family: str = "sd1") -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    return torch.as_tensor(tiny.drawn_by_diffusers(family, pipe, ["a cat"], [0], 2, 7.5))


def weights(pipe: DiffusionPipeline) -> dict[str, torch.Tensor]:
    return {f"{name}.{k}": v.clone() for name, part in networks(pipe).items() for k, v in part.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def pipeline(family: str) -> DiffusionPipeline:
    """As `from_pretrained` gives it: in evaluation, weights with gradients."""
    made = tiny.pipeline(family)
    for part in networks(made).values():
        part.eval()
    return made


def networks(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


@pytest.fixture
def pipe():
    return pipeline("sd1")


@pytest.fixture(scope="module")
def shared():
    pipe = pipeline("sd1")
    return pipe, weights(pipe)


@pytest.fixture
def untouched(shared):
    """A pipeline that the test leaves as it is."""
    pipe, before = shared
    yield pipe
    assert same(weights(pipe), before)


@pytest.mark.parametrize("family", ["sd1", "sd3", "dit"])
def test_a_pipeline_is_erased_in_place(family):
    pipe = pipeline(family)
    scheduler, parts, before, first = pipe.scheduler, networks(pipe), weights(pipe), generated(pipe, family)
    assert erase(pipe, "cat", **ESD) is pipe
    changed = [name for name, value in weights(pipe).items() if not torch.equal(value, before[name])]
    assert changed and all("attn" in name for name in changed)
    assert not torch.equal(generated(pipe, family), first)
    assert pipe.scheduler is scheduler and networks(pipe) == parts
    assert all(p.requires_grad for part in parts.values() for p in part.parameters())


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_an_adapter_is_merged_and_the_saved_pipeline_is_a_plain_one(pipe, tmp_path, kind):
    pipe.to(dtype=kind)
    settings = {**ESD, "student": LoRA("to_(q|k|v)$|conv1$", rank=2, alpha=2.0, convolutions=True)}
    before, first = weights(pipe), generated(pipe)
    erasure = erase(pipe, "cat", **settings, return_erasure=True)
    assert isinstance(erasure, Adapter) and same(weights(pipe), before)
    with erasure.applied_to(pipe):
        inside = generated(pipe)
    assert torch.equal(generated(pipe), first) and not torch.equal(inside, first)
    erase(pipe, "cat", **settings)
    assert pipe.dtype == kind
    torch.testing.assert_close(generated(pipe), inside, atol=1e-4 if kind == torch.float32 else 0.05, rtol=0)
    pipe.save_pretrained(tmp_path)
    again = type(pipe).from_pretrained(tmp_path, dtype=kind)
    assert same(weights(again), weights(pipe))


def test_an_erasure_is_saved_and_applied_to_another_pipeline(pipe, tmp_path):
    erasure = erase(pipe, ["cat", "dog"], method="uce", anchor="sky", retain=["bird"], return_erasure=True)
    erasure.save(str(tmp_path))
    assert "StableDiffusionPipeline" in (tmp_path / "README.md").read_text()
    with erasure.applied_to(pipe):
        inside = generated(pipe)
    other = pipeline("sd1")
    with Erasure.load(str(tmp_path)).applied_to(other):
        assert torch.equal(generated(other), inside)


@pytest.mark.parametrize("student", [{"parameters": "attn2"}, LoRA("to_k$", alpha=4.0)])
def test_a_second_erasure_is_made_on_top_of_the_first(pipe, student):
    first = erase(pipe, "cat", **{**ESD, "student": student}, return_erasure=True)
    both = erase(pipe, "dog", method=UCE(lamb=0.01), anchor="sky", after=first, return_erasure=True)
    with first.applied_to(pipe):
        alone = erase(pipe, "dog", method=UCE(lamb=0.01), anchor="sky", return_erasure=True)
        with alone.applied_to(pipe):
            inside = generated(pipe)
    with both.applied_to(pipe):
        assert torch.equal(generated(pipe), inside)
    erase(pipe, "dog", method=UCE(lamb=0.01), anchor="sky", after=first)
    torch.testing.assert_close(generated(pipe), inside, atol=1e-4, rtol=0)


def test_a_whole_task_may_be_erased_and_the_defaults_are_those_of_the_yaml(pipe):
    task = UnlearningTask((Concept("cat", anchor="sky"),), retain=(Concept("bird"),))
    by_task = erase(pipe, task, method="uce", return_erasure=True)
    by_name = erase(pipe, "cat", method="uce", anchor="sky", retain=["bird"], return_erasure=True)
    other = erase(pipe, "cat", method="uce", anchor="sky", retain=["bird"], lamb=9.0, return_erasure=True)
    assert by_task.digest == by_name.digest == erase(pipe, task, method=UCE(), return_erasure=True).digest
    assert other.digest != by_name.digest


@pytest.mark.parametrize(
    ("settings", "suggestion"),
    [
        ({"method": "esdx"}, "esd_x"),
        ({"method": "esd_x", "iteratons": 2}, "iterations"),
        ({"method": "uce", "ancor": "sky"}, "anchor"),
        ({"method": UCE(), "ancor": "sky"}, "anchor"),
        ({"method": "esd_x", "studnt": LoRA("to_k")}, "student"),
        ({"method": "esd_x", "optimizer": {"lrr": 1.0}}, "lr"),
        ({"method": "esd_x", "iterations": "many"}, "method.iterations"),
        ({"method": UCE(), "lamb": 0.1}, "UCE(lamb="),
        ({"method": "lcr"}, "VQGAN"),
        ({"method": "uce", "anchor": {"caat": "sky"}}, "cat"),
    ],
)
def test_a_mistake_gets_a_suggestion(untouched, settings, suggestion):
    with pytest.raises(UserError, match=suggestion.replace("(", r"\(")):
        erase(untouched, "cat", **settings)


TASK = UnlearningTask((Concept("cat"),))


@pytest.mark.parametrize(
    ("concept", "settings", "named"),
    [
        ("cat", {"template": "a photo of it"}, "`template`"),
        ("cat", {"template": "a photo of the {"}, "`template`"),
        ("cat", {"template": None}, "`template`"),
        ("cat", {"seed": -1}, "`seed`"),
        ("cat", {"seed": 1.5}, "`seed`"),
        ("cat", {"retain": "dog"}, "`retain`"),
        ("cat", {"synonyms": "kitty"}, "`synonyms`"),
        ("cat", {"anchor": None}, "`anchor`"),
        ("cat", {"return_erasure": "yes"}, "`return_erasure`"),
        ("cat", {"after": "outputs/erasure"}, r"Erasure\.load"),
        ("cat", {"method": UCE}, r"method=UCE\("),
        ("cat", {"method": None}, "method='uce'"),
        (None, {}, "Nothing to erase"),
        (3.10, {}, "quotes"),
        (TASK, {"anchor": "sky"}, "anchor"),
        (replace(TASK, template="a photo"), {}, r"`task\.template`"),
    ],
)
def test_a_value_that_does_not_fit_is_named_before_anything_is_made(untouched, concept, settings, named):
    with pytest.raises(UserError, match=named):
        erase(untouched, concept, **{"method": "uce", **settings})


@pytest.mark.parametrize("settings", [{"method": "negative_prompt"}, {"method": "spm", "iterations": 10**9}])
def test_an_erasure_without_weights_is_refused_before_training(untouched, settings):
    with pytest.raises(UserError, match="return_erasure=True"):
        erase(untouched, "cat", **settings)


def test_a_guidance_erasure_acts_in_the_model_and_blocks_plain_pipeline_calls(pipe):
    erasure, first = erase(pipe, "a cat", method="negative_prompt", return_erasure=True), generated(pipe)
    with as_model(pipe) as model:
        base = Sampler(steps=2)(model, ["a dog"], [0])
    with erasure.applied_to(pipe) as model:
        assert not torch.equal(Sampler(steps=2)(model, ["a dog"], [0]), base)
        with pytest.raises(UserError, match="Sampler"):
            generated(pipe)
    assert torch.equal(generated(pipe), first)


def test_the_gate_of_an_outer_erasure_applies_inside_an_inner_one(pipe):
    few = {"iterations": 1, "steps": 2, "optimizer": {"lr": 0.1}, "scheduler": None}
    gated = erase(pipe, "cat", method="spm", **few, return_erasure=True)
    patch = erase(pipe, "dog", method="uce", anchor="sky", return_erasure=True)
    with gated.applied_to(pipe) as outer, patch.applied_to(pipe) as inner:
        assert inner is outer and len(inner.applied) == 2
        with pytest.raises(UserError, match="Sampler"):
            generated(pipe)


def test_generators_and_precisions_stay_as_they_are():
    pipe = tiny.pipeline("sdxl").to(dtype=torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    state = torch.get_rng_state()
    erase(pipe, "cat", method="uce", anchor="sky")
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float16}
    assert torch.equal(torch.get_rng_state(), state)
    trained = [erase(pipeline("sd1"), "cat", **ESD, return_erasure=True, seed=seed).digest for seed in (0, 0, 1)]
    assert trained[0] == trained[1] != trained[2]


def test_a_pipeline_is_of_the_family_that_has_its_class():
    for family, kind in tiny.FAMILIES.items():
        with as_model(tiny.pipeline(family)) as model:
            assert type(model) is kind
    with as_model(tiny.pixart(PixArtAlphaPipeline)) as model:
        assert isinstance(model, tiny.FAMILIES["pixart"])
    other = DDPMPipeline(UNet2DModel(8, block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2,
                                     up_block_types=("UpBlock2D",) * 2), DDPMScheduler())  # fmt: skip
    with pytest.raises(UserError, match=r"DDPMPipeline.*PixArtAlphaPipeline"):
        erase(other, "cat", method="uce")


def test_importing_the_package_imports_nothing_heavy():
    code = "import sys, unlearning; sys.exit('torch' in sys.modules or 'erase' not in unlearning.__all__)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(("student", "dtype"), [({"parameters": "attn2"}, "float32"), (LoRA("attn2"), "bfloat16")])
def test_a_dtype_in_which_nothing_can_be_trained_is_answered_with_the_call_that_helps(pipe, student, dtype):
    pipe.to(dtype=torch.float16)
    with pytest.raises(UserError, match=rf"pipe\.to\(torch\.{dtype}\)"):
        erase(pipe, "cat", **{**ESD, "student": student})


class Int8Linear(torch.nn.Linear):
    """A linear map that stores its weight as 8-bit codes, as bitsandbytes does."""

    def __init__(self, layer: torch.nn.Linear):
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        weight, self.bias = layer.weight.detach(), layer.bias
        self.scale = weight.abs().amax() / 127
        self.weight = torch.nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight * self.scale, self.bias)


@pytest.fixture(params=["integers", "torchao"])
def quantised(pipe, request):
    """A pipeline with a UNet that stores its linear maps as 8-bit codes."""
    if request.param == "torchao":
        torchao = pytest.importorskip("torchao.quantization", reason="an optional package; tests with integers remain")
        torchao.quantize_(pipe.unet, torchao.Int8WeightOnlyConfig())
        return pipe
    for name, layer in [*pipe.unet.named_modules()]:
        if type(layer) is torch.nn.Linear:
            pipe.unet.set_submodule(name, Int8Linear(layer))
    return pipe


def test_an_adapter_is_trained_beside_quantised_weights_which_stay_quantised(quantised):
    first, held = generated(quantised), [(type(p), p.dtype) for p in quantised.unet.parameters()]
    erasure = erase(quantised, "cat", **{**ESD, "student": LoRA("attn2", rank=2)}, return_erasure=True)
    with erasure.applied_to(quantised):
        assert not torch.equal(generated(quantised), first)
    assert torch.equal(generated(quantised), first)
    assert [(type(p), p.dtype) for p in quantised.unet.parameters()] == held


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "uce", "anchor": "sky", "return_erasure": True},
        {**ESD, "return_erasure": True},
        {**ESD, "iterations": 10**9, "student": LoRA("attn2")},
    ],
)
def test_new_values_for_quantised_weights_are_refused_before_anything_is_trained(quantised, settings):
    with pytest.raises(UserError, match="quantised"):
        erase(quantised, "cat", **settings)


def test_a_patch_is_not_written_into_integers(pipe):
    patch = erase(pipe, "cat", method="uce", anchor="sky", return_erasure=True)
    layer = pipe.unet.get_submodule(next(iter(patch.weights)).removeprefix("unet.").removesuffix(".weight"))
    codes = (127 * layer.weight.detach()).to(torch.int8)
    layer.weight = torch.nn.Parameter(codes.clone(), requires_grad=False)
    with pytest.raises(UserError, match="quantised"), patch.applied_to(pipe):
        pass
    assert torch.equal(layer.weight, codes)


def test_a_pipeline_whose_parts_are_moved_when_they_work_is_erased(pipe):
    alone = erase(pipeline("sd1"), "cat", **ESD, return_erasure=True)
    pipe.enable_model_cpu_offload(device="cpu")
    assert erase(pipe, "cat", **ESD, return_erasure=True).digest == alone.digest


def test_weights_that_are_not_in_memory_are_refused(pipe):
    cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
    with pytest.raises(UserError, match="enable_model_cpu_offload"):
        erase(pipe, "cat", **ESD)

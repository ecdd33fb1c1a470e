"""Erasures nest, compose, and are restored in a process that has not imported their classes."""

import json
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass, replace
from importlib.resources import files

import pytest
import torch

from tests import processes
from unlearning.concepts import Concept, UnlearningTask
from unlearning.erasures.base import Erasure, from_json
from unlearning.erasures.composed import Composed, composed
from unlearning.erasures.guidance_edit import GuidanceEdit
from unlearning.erasures.module_edit import Adapter, Gate
from unlearning.erasures.prompt_edit import ConditioningEdit, PromptEdit
from unlearning.erasures.weight_patch import WeightPatch
from unlearning.errors import UserError
from unlearning.methods.uce import UCE
from unlearning.models.guidance import Guidance
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.guidance import ClassifierFree, NegativePrompt
from unlearning.sampling.sampler import Sampler
from unlearning.training.student import LoRA, Weights


@dataclass(frozen=True)
class Shifted(ConditioningEdit):
    """Moves every state by a constant, for the first steps only."""

    by: float
    steps: int = 100

    def __call__(self, model, text, c):
        steps = torch.full((len(c),), self.steps)
        return replace(c, embeds=c.embeds + self.by, steps=steps, later=c)


@dataclass(frozen=True)
class HalfForCats(Gate):
    """Half of the modules for prompts about cats, none for others."""

    def __call__(self, model, text, c):
        return torch.tensor([0.5 * ("cat" in prompt) for prompt in c.prompts])


@pytest.fixture
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


@pytest.fixture
def predict(model):
    x_t, t = model.noise([5, 6]), torch.tensor(400)

    def call() -> torch.Tensor:
        with torch.no_grad():
            return model.predict(x_t, t, model.encode_prompts(["a cat", "a dog"]))

    return call


def adapter(model, seed: int, modules: str = r"attn2\.to_(k|v)$") -> Adapter:
    torch.manual_seed(seed)
    with LoRA(modules, rank=2).of(model) as pair, torch.no_grad():
        for p in pair.parameters.values():
            p.normal_(std=0.3)
        return pair.erasure()


def patch(model, pattern: str, seed: int = 0) -> WeightPatch:
    torch.manual_seed(seed)
    moved = {n: p for n, p in model.named_parameters().items() if pattern in n}
    return WeightPatch({n: p.detach() + 0.1 * torch.randn_like(p) for n, p in moved.items()})


def every_kind(model) -> list[Erasure]:
    return [
        patch(model, "attn2"),
        adapter(model, 1),
        replace(adapter(model, 2), gate=HalfForCats()),
        PromptEdit(Shifted(0.3)),
        GuidanceEdit(NegativePrompt("a dog")),
        patch(model, "text_encoder."),
    ]


def test_leaving_an_erasure_undoes_only_its_own_edit(model, predict):
    """Nested in any order, leaving the inner one gives back what the outer one alone gives."""
    kinds, before = every_kind(model), predict()
    for outer in kinds:
        with outer.applied_to(model):
            alone = predict()
            for inner in kinds:
                with inner.applied_to(model):
                    assert model.applied == (outer.digest, inner.digest)
                assert torch.equal(predict(), alone)
        assert torch.equal(predict(), before)
    assert not model.side and not model.text_edits and model.guidance is None and not model.applied


def test_two_adapters_add_up(model, predict):
    one, two = adapter(model, 1), adapter(model, 2)
    whole = Adapter({
        k: torch.cat([v, two.weights[k]], dim=0 if "lora_A" in k else 1) for k, v in one.weights.items()
    })  # fmt: skip
    with whole.applied_to(model):
        expected = predict()
    with one.applied_to(model), two.applied_to(model):
        torch.testing.assert_close(predict(), expected, atol=1e-5, rtol=1e-4)


def test_the_same_adapter_twice_counts_twice(model, predict):
    one = adapter(model, 1)
    twice = Adapter({k: 2 * v if "lora_B" in k else v for k, v in one.weights.items()})
    with twice.applied_to(model):
        expected = predict()
    with one.applied_to(model), one.applied_to(model):
        torch.testing.assert_close(predict(), expected, atol=1e-5, rtol=1e-4)


def test_composed_is_nested(model, predict):
    kinds = every_kind(model)
    with ExitStack() as stack:
        for erasure in kinds:
            stack.enter_context(erasure.applied_to(model))
        expected = predict()
    with composed(*kinds).applied_to(model):
        assert torch.equal(predict(), expected)


def test_composed_flattens_its_parts(model):
    a, b = patch(model, "attn2.to_k", 1), patch(model, "attn2", 2)
    assert composed(a, b).weights.keys() == b.weights.keys() | a.weights.keys()
    assert all(torch.equal(v, b.weights[n]) for n, v in composed(a, b).weights.items())
    one = adapter(model, 1)
    assert composed(WeightPatch({}), one) is one
    assert composed(WeightPatch({}), WeightPatch({})).empty
    nested = composed(composed(a, one), b)
    assert isinstance(nested, Composed) and len(nested.parts) == 3


def test_an_erasure_is_restored_from_disk_alone_and_composed(model, predict, tmp_path):
    kinds = every_kind(model)
    for i, whole in enumerate([*kinds, *(composed(erasure, adapter(model, 7)) for erasure in kinds)]):
        whole.save(tmp_path / str(i), base=model)
        again = Erasure.load(tmp_path / str(i))
        assert again.digest == whole.digest, whole
        with whole.applied_to(model):
            expected = predict()
        with again.applied_to(model):
            assert torch.equal(predict(), expected), whole


def test_its_readme_names_no_folder_of_this_machine(model, tmp_path):
    weights = files("unlearning") / "weights"
    names = {str(weights / "emoji_unet"): "weights/emoji_unet", "me/sd15": "me/sd15", "/disk/sd15": "to/sd15"}
    for i, erasure in enumerate(every_kind(model)):
        for name, shown in names.items():
            base = copy(model)
            base.name = name
            erasure.save(tmp_path / str(i), base=base)
            text = (tmp_path / str(i) / "README.md").read_text()
            assert shown in text and str(weights) not in text and "/disk" not in text, erasure


def test_a_fresh_process_restores_it(model, tmp_path):
    """The guidance's class is imported by its path, wherever it is."""
    whole = composed(adapter(model, 1), GuidanceEdit(NegativePrompt("a dog")))
    whole.save(tmp_path, base=model)
    code = "import sys; from unlearning.erasures.base import Erasure; print(Erasure.load(sys.argv[1]).digest)"
    assert processes.run(code, [tmp_path]).strip() == whole.digest


def test_a_class_outside_the_package_or_of_another_type_is_refused(model, tmp_path):
    for kind in ("os.system", "unlearning.concepts.Concept", "unlearning.no_such.Thing", "WeightPatch"):
        with pytest.raises(UserError, match=kind.replace(".", r"\.")):
            from_json({"kind": kind}, Guidance)
    GuidanceEdit(ClassifierFree()).save(tmp_path, base=model)
    saved = json.loads((tmp_path / "erasure.json").read_text())
    (tmp_path / "erasure.json").write_text(json.dumps({**saved, "kind": "subprocess.Popen"}))
    with pytest.raises(UserError, match="Popen"):
        Erasure.load(tmp_path)


@pytest.mark.parametrize("damage", ["missing", "another", "short"])
def test_weights_that_differ_from_the_saved_digest_are_refused(model, tmp_path, damage):
    patch(model, "attn2").save(tmp_path, base=model)
    path = tmp_path / "weights.safetensors"
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:200])
    else:
        patch(model, "attn2", seed=9).save(tmp_path / "other", base=model)
        (tmp_path / "other" / "weights.safetensors").replace(path)
    with pytest.raises(UserError, match=r"weights\.safetensors"):
        Erasure.load(tmp_path)


# --- fitting on a model that has erasures already ---------------------------------------------------------------------


@pytest.mark.parametrize("student", [LoRA(r"attn2\.to_(k|v)$", rank=1), Weights(r"^unet\..*attn2")])
def test_a_student_trains_inside_applied_erasures(model, predict, student):
    outer = composed(*every_kind(model)[:3])
    with outer.applied_to(model):
        before = predict()
        with student.of(model) as pair:
            with torch.no_grad():
                for p in pair.parameters.values():
                    p.add_(0.2 * torch.randn_like(p))
            moved = predict()
            x_t, t = model.noise([5, 6]), torch.tensor(400)
            c = model.encode_prompts(["a cat", "a dog"])
            with torch.no_grad():
                torch.testing.assert_close(pair.teacher.predict(x_t, t, c), before)
            inner = pair.erasure()
        assert torch.equal(predict(), before)
        with inner.applied_to(model):
            torch.testing.assert_close(predict(), moved, atol=1e-5, rtol=1e-4)
    with composed(outer, inner).applied_to(model):
        torch.testing.assert_close(predict(), moved, atol=1e-5, rtol=1e-4)


def test_a_closed_form_solves_on_the_model_with_its_applied_erasures(model):
    task = UnlearningTask(erase=(Concept("cat"),))
    first = patch(model, "attn2.to_k", 3)
    plain = UCE().fit(model, task)
    with first.applied_to(model):
        second = UCE().fit(model, task)
    assert any(not torch.equal(v, plain.weights[n]) for n, v in second.weights.items())


# --- text encoders ----------------------------------------------------------------------------------------------------


def test_the_conditioning_is_differentiable_in_text_weights_and_token_embeddings(any_model):
    if not any_model.text_encoders:
        pytest.skip("a class is no text")
    text = any_model.embed(["a cat", "a dog"])
    again = any_model.encode_prompts(text)
    assert torch.equal(again.embeds, any_model.encode_prompts(["a cat", "a dog"]).embeds)
    embeds = {part: e.clone().requires_grad_(True) for part, e in text.embeds.items()}
    any_model.encode(replace(text, embeds=embeds)).embeds.float().square().sum().backward()
    attended = [e.grad.abs().sum() > 0 for e in embeds.values() if e.grad is not None]
    assert attended and all(attended)
    weights = [p for n, p in any_model.named_parameters().items() if n.startswith("text_encoder")]
    for p in weights:
        p.requires_grad_(True)
    try:
        any_model.encode(["a cat"]).embeds.float().square().sum().backward()
        assert any(p.grad is not None and p.grad.any() for p in weights)
    finally:
        for p in weights:
            p.requires_grad_(False)
            p.grad = None


@pytest.mark.parametrize("any_pipeline", ["sdxl", "sd3", "dit"], indirect=True)
def test_an_empty_list_of_prompts_gives_zero_rows(any_model):
    assert len(any_model.encode_prompts([])) == 0
    assert any_model.encode_prompts([]).embeds.shape[1:] == any_model.encode_prompts([""]).embeds.shape[1:]


def test_word_pieces_are_where_a_words_states_differ(any_model):
    """In a causal or bidirectional encoder, embeddings differ from the null prompt's exactly at the word's pieces."""
    if not any_model.text_encoders:
        pytest.skip("a class is no text")
    [word], [nothing] = any_model.word_pieces(["cat"]), any_model.word_pieces([""])
    assert len(nothing) == 0 and len(word) == len(any_model.token_ids(["cat"])[0]) > 0
    assert word.stop - 1 == any_model.last_token(["cat"])[0]


def test_a_frozen_text_encoder_of_a_snapshot_keeps_its_states(sd1):
    model = StableDiffusion.load(str(sd1), device="cpu")
    before = model.encode_prompts(["a cat"]).embeds
    with Weights(r"^text_encoder\.").of(model) as pair:
        with torch.no_grad():
            for p in pair.parameters.values():
                p.add_(0.1)
        assert torch.equal(pair.teacher.encode_prompts(["a cat"]).embeds, before)
        assert not torch.allclose(pair.student.encode_prompts(["a cat"]).embeds, before)
    assert torch.equal(model.encode_prompts(["a cat"]).embeds, before)


# --- edits of the conditioning ----------------------------------------------------------------------------------------


def test_the_sampler_follows_a_conditioning_schedule(model):
    shift = PromptEdit(Shifted(0.5, steps=2))
    walk = []
    with shift.applied_to(model):
        c = model.encode_prompts(["a cat", "a dog"])
        for step in range(4):
            walk.append(c.at(step).embeds)
    plain = model.encode_prompts(["a cat", "a dog"]).embeds
    assert [torch.equal(embeds, plain) for embeds in walk] == [False, False, True, True]


def test_plain_diffusers_draws_the_edited_prompts_by_a_callback(model):
    shift = PromptEdit(Shifted(0.5, steps=2))
    with shift.applied_to(model):
        ours = Sampler(steps=4, guidance_scale=7.5)(model, ["a cat"], [3])
    theirs = model.pipeline(
        **shift.for_diffusers(model, ["a cat"]), num_inference_steps=4, guidance_scale=7.5, height=16, width=16,
        generator=torch.Generator().manual_seed(3), output_type="pt",
    ).images  # fmt: skip
    unedited = Sampler(steps=4, guidance_scale=7.5)(model, ["a cat"], [3])
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert not torch.allclose(ours, unedited, atol=1e-3)

"""SAFREE's theorems (Yoon et al., 2024)."""

from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch.fft import fft2, fftshift

from unlearning.concepts import Concept, UnlearningTask
from unlearning.erasures.composed import Composed
from unlearning.erasures.guidance_edit import GuidanceEdit
from unlearning.erasures.prompt_edit import PromptEdit
from unlearning.errors import UserError
from unlearning.methods.safree import FOREVER, SAFREE, LatentFilter, SubspaceFilter, joints, projector
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.sampling.guidance import ClassifierFree, begin
from unlearning.sampling.sampler import Sampler

PROMPTS, SEEDS = ["a photo of a cat", "the cat and a dog", "a ship on the sea"], [1, 2, 3]
CATS = SubspaceFilter(("cat", "a kitten"))
NO_TRIGGERS = replace(CATS, alpha=100.0)
TASK = UnlearningTask(erase=(Concept("cat"), Concept("dog")))


@pytest.fixture(scope="module")
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


def filtered(model, edit: SubspaceFilter, prompts=PROMPTS):
    """(the prompts' own conditioning, the filtered one)."""
    own = model.encode(prompts, edits=())
    return own, edit(model, prompts, own)


# --- the text ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 3, 9])
def test_the_projector_is_one(n):
    torch.manual_seed(0)
    vectors = torch.randn(n, 8)
    vectors = torch.cat([vectors, 2 * vectors[:1] - vectors[-1:]])  # which adds nothing to the span
    P = projector(vectors)
    torch.testing.assert_close(P @ P, P, atol=1e-9, rtol=0)
    torch.testing.assert_close(P, P.T, atol=1e-9, rtol=0)
    torch.testing.assert_close(P @ vectors.double().T, vectors.double().T, atol=1e-6, rtol=0)
    assert round(P.trace().item()) == min(n, 8)


@torch.no_grad()
def expected(model, edit: SubspaceFilter, prompt: str) -> tuple[list[int], torch.Tensor, int]:
    """By the text encoder's own pooled output and a loop over tokens: triggers' places, states there, and t'."""
    tokenizer, encoder = model.pipeline.tokenizer, model.pipeline.text_encoder

    def pooled(ids: list[list[int]]) -> torch.Tensor:
        return torch.stack([encoder(torch.tensor([row])).pooler_output[0].double() for row in ids])

    def onto(vectors: torch.Tensor) -> torch.Tensor:
        return vectors.T @ torch.linalg.pinv(vectors @ vectors.T) @ vectors

    ids = tokenizer(prompt).input_ids
    places = range(1, len(ids) - 1)
    masked = pooled([[0 if i == j else token for j, token in enumerate(ids)] for i in places])
    outside = torch.eye(masked.shape[1]) - onto(pooled([tokenizer(phrase).input_ids for phrase in edit.concepts]))
    d = [float((outside @ p).norm()) for p in masked]
    triggers = [
        place
        for i, place in enumerate(places)
        if d[i] >= (1 + edit.alpha) * sum(d[:i] + d[i + 1 :]) / (len(d) - 1)
    ]  # fmt: skip
    states = encoder(torch.tensor([ids])).last_hidden_state[0].double()
    projected = torch.stack([outside @ onto(masked) @ e for e in states])
    beta = 1 - torch.cosine_similarity(states, projected, dim=1).mean()
    return triggers, projected[triggers], round(edit.up_t * float(torch.sigmoid(2 * edit.k * (10 * beta - edit.b))))


@pytest.mark.parametrize("alpha", [0.0, 0.01])
def test_only_triggers_are_projected(model, alpha):
    edit = replace(CATS, alpha=alpha)
    own, c = filtered(model, edit)
    assert c.later is own
    for i, prompt in enumerate(PROMPTS):
        places, states, t = expected(model, edit, prompt)
        assert (c.embeds[i] != own.embeds[i]).any(1).nonzero().flatten().tolist() == places
        assert 0 < len(places) < 32
        torch.testing.assert_close(c.embeds[i, places].double(), states, atol=1e-4, rtol=1e-4)
        assert c.steps[i] == t + 1


def test_a_prompt_without_triggers_is_unchanged(model):
    own, c = filtered(model, NO_TRIGGERS)
    assert torch.equal(c.embeds, own.embeds)
    plain = Sampler(steps=3)(model, PROMPTS, SEEDS)
    for latent in (None, LatentFilter()):
        erasure = SAFREE(concepts=["cat"], alpha=100.0, latent=latent).fit(model, TASK)
        with erasure.applied_to(model):
            torch.testing.assert_close(Sampler(steps=3)(model, PROMPTS, SEEDS), plain, atol=2e-5, rtol=0)


def test_the_null_prompt_stays_and_an_only_word_piece_is_a_trigger(model):
    own, c = filtered(model, CATS, ["", "x"])
    assert torch.equal(c.embeds[0], own.embeds[0])
    assert (c.embeds[1] != own.embeds[1]).any(1).nonzero().flatten().tolist() == [1]


@pytest.mark.parametrize(("beta", "steps"), [(0.0, 1), (0.5333, 6), (1.0, 11)])
def test_a_stronger_filter_applies_for_more_steps(beta, steps):
    assert CATS.steps(beta) == steps
    assert replace(CATS, up_t=None).steps(beta) == FOREVER


def test_after_its_steps_a_prompt_is_unfiltered(model):
    own, c = filtered(model, replace(CATS, up_t=4))
    for i, steps in enumerate(c.steps.tolist()):
        assert torch.equal(c.at(steps - 1).embeds[i], c.embeds[i])
        assert torch.equal(c.at(steps).embeds[i], own.embeds[i])
        assert not torch.equal(c.embeds[i], own.embeds[i])


def test_rows_do_not_change_each_other(model):
    _, together = filtered(model, CATS)
    for i, prompt in enumerate(PROMPTS):
        _, alone = filtered(model, CATS, [prompt])
        torch.testing.assert_close(together[i : i + 1].embeds, alone.embeds, atol=1e-5, rtol=0)
        assert together.steps[i] == alone.steps[0]


def test_token_embeddings_of_an_attack_are_filtered_too_and_have_gradients(model):
    embedded = model.embed(PROMPTS)
    embedded.embeds["text_encoder"].requires_grad_()
    c = CATS(model, embedded, model.encode(embedded, edits=()))
    torch.testing.assert_close(c.embeds, filtered(model, CATS)[1].embeds)
    c.embeds.square().sum().backward()
    assert embedded.embeds["text_encoder"].grad.abs().sum(-1)[:, 1:4].all()


def test_plain_diffusers_draws_the_same_image(model):
    erasure = SAFREE(concepts=["cat"], up_t=4).fit(model, TASK)
    assert isinstance(erasure, PromptEdit)
    _, c = filtered(model, erasure.edit)
    assert 1 <= c.steps.min() <= c.steps.max() < 8, "the prompt is itself again before the end"
    with erasure.applied_to(model):
        ours = Sampler(steps=8)(model, PROMPTS, SEEDS)
    theirs = model.pipeline(
        **erasure.for_diffusers(model, PROMPTS), num_inference_steps=8, output_type="pt",
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
    ).images  # fmt: skip
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=0)
    assert not torch.allclose(ours, Sampler(steps=8)(model, PROMPTS, SEEDS), atol=1e-4)


@pytest.mark.parametrize("any_pipeline", ["sd1", "sdxl", "sd3", "flux", "pixart", "sana", "dit"], indirect=True)
def test_each_text_encoder_filters_its_own_states(any_pipeline, any_model):
    if any_pipeline[0] == "dit":
        with pytest.raises(UserError, match="reads no text"):
            SAFREE().fit(any_model, TASK)
        return
    prompts = ["a cat", "dogs"]
    own, c = filtered(any_model, replace(CATS, alpha=-1.0), prompts)  # every word piece is a trigger
    after = any_model.text_states(c)
    for name, states in any_model.text_states(own).items():
        changed = (after[name] != states).any(-1)
        for row, pieces in zip(changed, any_model.word_pieces(prompts, name), strict=True):
            assert row.nonzero().flatten().tolist() == list(pieces)
    assert all(torch.equal(c.extra[name], extra) for name, extra in own.extra.items())
    with SAFREE(alpha=-1.0, up_t=None).fit(any_model, TASK).applied_to(any_model):
        images = Sampler(steps=1)(any_model, prompts[:1], SEEDS[:1])
    assert not torch.equal(images, Sampler(steps=1)(any_model, prompts[:1], SEEDS[:1]))


# --- the latent filter ------------------------------------------------------------------------------------------------


def spectrum(features: torch.Tensor) -> torch.Tensor:
    return fftshift(fft2(features), dim=(-2, -1))


@pytest.mark.parametrize("constant", [False, True])
def test_low_frequencies_are_attenuated_where_the_filtered_prompt_has_more_of_them(constant):
    torch.manual_seed(0)
    h, h_0, s = torch.randn(2, 3, 8, 8), torch.randn(2, 3, 8, 8), 0.2
    after = LatentFilter(constant=constant).reattended(h, h_0, s)
    Z, Z_0 = spectrum(h), spectrum(h_0)
    for row, column in [(3, 3), (3, 4), (4, 3), (4, 4)]:
        more = Z[..., row, column].real > Z_0[..., row, column].real
        assert more.any() and not more.all()
        instead = torch.full_like(Z[..., row, column], s) if constant else s * Z[..., row, column]
        Z[..., row, column] = torch.where(more, instead, Z[..., row, column])
    back = torch.fft.ifft2(torch.fft.ifftshift(Z, dim=(-2, -1))).real
    torch.testing.assert_close(after, back)


def test_a_factor_of_one_changes_nothing(model):
    guidances = LatentFilter(1.0, 1.0), ClassifierFree(), LatentFilter()
    images = []
    with PromptEdit(CATS).applied_to(model):
        for guidance in guidances:
            with GuidanceEdit(guidance).applied_to(model):
                images.append(Sampler(steps=4)(model, PROMPTS, SEEDS))
    torch.testing.assert_close(images[0], images[1], atol=2e-5, rtol=0)
    assert not torch.allclose(images[2], images[1], atol=1e-4)


def test_it_ends_with_the_filtered_prompt_and_the_released_code_never(model):
    def predictions(guidance) -> list[torch.Tensor]:
        with PromptEdit(replace(CATS, up_t=0)).applied_to(model), GuidanceEdit(guidance).applied_to(model):
            walk = begin(model, model.encode_prompts(PROMPTS), 7.5)
            return [walk(model.noise(SEEDS), torch.tensor(500)) for _ in range(3)]

    plain, ours, released = map(predictions, (ClassifierFree(), LatentFilter(), LatentFilter(constant=True)))
    assert [torch.allclose(a, b, atol=1e-5) for a, b in zip(ours, plain, strict=True)] == [False, True, True]
    assert not any(torch.allclose(a, b, atol=1e-5) for a, b in zip(released, plain, strict=True))


def test_it_leaves_no_hooks(model):
    with SAFREE(latent=LatentFilter()).fit(model, TASK).applied_to(model):
        Sampler(steps=2)(model, PROMPTS[:1], SEEDS[:1])
    assert not any(resnet._forward_pre_hooks for resnet, _ in joints(model.denoiser))


def test_widths_are_those_of_the_features_that_the_released_code_looks_at():
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=768)  # Stable Diffusion 1's
    assert [width for _, width in joints(unet)] == [1280] * 7 + [640] * 3 + [320] * 2


@pytest.mark.parametrize("any_pipeline", ["sd1", "sd3"], indirect=True)
def test_the_latent_filter_needs_a_unet(any_pipeline, any_model):
    method = SAFREE(latent=LatentFilter())
    if any_pipeline[0] == "sd1":
        assert isinstance(method.fit(any_model, TASK), Composed)
    else:
        with pytest.raises(UserError, match="safree_text"):
            method.fit(any_model, TASK)


def test_the_subspace_is_of_the_erased_concepts_unless_others_are_given(model):
    assert SAFREE().fit(model, TASK).edit.concepts == ("cat", "dog")
    assert SAFREE(concepts=["Nudity"]).fit(model, TASK).edit.concepts == ("Nudity",)

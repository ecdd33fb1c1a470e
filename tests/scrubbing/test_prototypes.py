"""The search for prototypes, with a teacher whose features are the latents themselves and a planted concept."""

import pytest
import torch
import torch.nn.functional as F

from unlearning.errors import UserError
from unlearning.models.conditioning import Conditioning
from unlearning.scrubbing.prototypes import PrototypeSearch

D, SIDE, MEAN = 24, 8, 5.0


class Identity:
    """A teacher that returns its input as features."""

    device = torch.device("cpu")

    def encode_prompts(self, prompts):
        return Conditioning(torch.zeros(len(prompts), 1, 1))

    def add_noise(self, z_0, eps, t):
        return z_0

    def features(self, x_t, t, c, layer):
        return x_t


@pytest.fixture
def images():
    """(forget, retain, where): backgrounds of a few directions around a common mean; the concept is a square."""
    torch.manual_seed(0)
    directions = F.normalize(torch.randn(7, D), dim=1)
    background, concept = 3 * directions[:6], 3 * directions[6]

    def scenery(count):
        which = torch.randint(len(background), (count, SIDE, SIDE))
        return (background[which] + 0.3 * torch.randn(count, SIDE, SIDE, D) + MEAN).permute(0, 3, 1, 2)

    forget, retain, where = scenery(24), scenery(24), torch.zeros(24, SIDE, SIDE, dtype=torch.bool)
    for image, mask in zip(forget, where, strict=True):
        top, left = torch.randint(SIDE - 3, (2,)).tolist()
        mask[top : top + 3, left : left + 3] = True
        image[:, mask] = (concept + 0.3 * torch.randn(9, D) + MEAN).T
    return forget, retain, where


def masks(search, forget, retain):
    prototypes, teacher = search(Identity(), forget, retain), Identity()
    return prototypes, *(search.mask(prototypes, teacher, latents)[:, 0] for latents in (forget, retain))


def test_masks_cover_the_planted_concept_and_not_the_background(images):
    forget, retain, where = images
    prototypes, M, M_retain = masks(PrototypeSearch(K=12, tau="calibrated", quantile=0.99), forget, retain)
    assert M[where].mean() > 0.8 and M[~where].mean() < 0.1 and M_retain.mean() < 0.1
    torch.testing.assert_close(prototypes.directions.norm(dim=1), torch.ones(len(prototypes.directions)))


class Prompted(Identity):
    """A teacher with a prediction that depends on the prompt only where the image shows `what`."""

    def __init__(self, what):
        self.what = F.normalize(what - MEAN, dim=0)

    def encode_prompts(self, prompts):
        return Conditioning(torch.tensor([[[float(bool(p))]] for p in prompts]))

    def predict(self, x_t, t, c):
        there = torch.einsum("bdhw,d->bhw", F.normalize(x_t - MEAN, dim=1), self.what) > 0.5
        return there[:, None] * c.embeds[:, :, None]

    def to_x0(self, prediction, x_t, t):
        return prediction


@pytest.mark.parametrize("shared", [False, True])
def test_prototypes_beside_the_concept_are_dropped_where_words_change_nothing(images, shared):
    forget, retain, where = images
    torch.manual_seed(1)
    beside, teacher = torch.zeros_like(where), Prompted(forget[0][:, where[0]].mean(1))
    for picture, mask, concept in zip(forget, beside, where, strict=True):
        mask[-1] = ~concept[-1]  # a strip that the retain images do not have
        picture[:, mask] = MEAN + torch.linspace(-1, 1, D)[:, None] + 0.3 * torch.randn(D, int(mask.sum()))
    if shared:  # a few retain images show something similar
        retain[:4, :, :3, :3] = forget[0][:, where[0]].reshape(D, 3, 3)
    search = PrototypeSearch(K=12, tau="calibrated", quantile=0.99)
    prototypes = search(teacher, forget, retain)

    def covered(prototypes):
        M = search.mask(prototypes, teacher, forget)[:, 0]
        return M[where].mean(), M[beside].mean()

    on, off = covered(prototypes)
    assert off > 0.8 and (on < 0.1 if shared else on > 0.8), "without words, they look alike"
    on, off = covered(search.confirm(prototypes, teacher, forget, retain, teacher.encode_prompts(["mug"])))
    assert on > (0.4 if shared else 0.8) and off < 0.1

    assert PrototypeSearch(confirmed=False).confirm(prototypes, teacher, forget, retain, None) is prototypes
    silent = Prompted(MEAN - teacher.what)
    assert search.confirm(prototypes, silent, forget, retain, teacher.encode_prompts([""])) is prototypes, (
        "words that change nothing drop nothing"
    )


def test_without_retain_images_the_background_is_part_of_the_mask(images):
    forget, retain, where = images
    as_published = PrototypeSearch(K=12, tau=0.6, centred=False, purity=0.0)
    _, M, _ = masks(as_published, forget, forget[:0])
    assert M[~where].mean() > 0.9
    prototypes = as_published(Identity(), forget, retain[:0])
    assert not prototypes.centre.any() and len(prototypes.directions) == 12


def test_a_calibrated_tau_is_the_quantile_of_the_retain_similarities(images):
    forget, retain, _ = images
    search = PrototypeSearch(K=12, tau="calibrated", quantile=0.9, draws=1)
    prototypes = search(Identity(), forget, retain)
    S = search.similarities(prototypes, Identity(), retain).amax(1)
    assert (prototypes.tau < S).float().mean().item() == pytest.approx(0.1, abs=0.01)


def test_a_mask_is_the_sigmoid_of_the_similarity_at_the_latents_size(images):
    forget, retain, _ = images
    prototypes = PrototypeSearch(K=12, tau=0.4, alpha=7.0)(Identity(), forget, retain)
    S = torch.rand(2, SIDE, SIDE)
    torch.testing.assert_close(prototypes.mask(S, (SIDE, SIDE))[:, 0], torch.sigmoid(7 * (S - 0.4)))
    assert prototypes.mask(S, (16, 24)).shape == (2, 1, 16, 24)


def test_a_mask_that_is_not_interpolated_repeats_each_place_of_the_grid(images):
    forget, retain, _ = images
    prototypes = PrototypeSearch(K=12, tau=0.4, alpha=7.0, interpolated=False)(Identity(), forget, retain)
    S = torch.rand(2, SIDE, SIDE)
    repeated = torch.sigmoid(7 * (S - 0.4)).repeat_interleave(2, 1).repeat_interleave(3, 2)
    torch.testing.assert_close(prototypes.mask(S, (2 * SIDE, 3 * SIDE))[:, 0], repeated)


@pytest.mark.parametrize(("spherical", "second"), [(True, (0.0, 1.0)), (False, (0.5**0.5, 0.5**0.5))])
def test_raw_vectors_are_clustered_by_their_lengths_too(spherical, second):
    """Vectors along a, of lengths 1 and 10, and along b, of length 1: the short ones are near each other."""
    image = torch.tensor([[1.0, 0.0], [10.0, 0.0], [0.0, 1.0]]).repeat(12, 1).T.reshape(1, 2, 6, 6)
    search = PrototypeSearch(K=2, tau=0.6, centred=False, purity=0.0, spherical=spherical)
    directions = search(Identity(), image, image[:0]).directions
    expected = torch.tensor([(1.0, 0.0), second])
    torch.testing.assert_close(directions[directions[:, 0].argsort(descending=True)], expected, atol=0.05, rtol=0)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"K": 100_000}, r"method\.prototypes\.K"),
        ({"tau": "calibrated", "without": True}, "tau=calibrated"),
        ({"without": True}, "retain=/a/folder"),
        ({"same": True}, r"method\.prototypes\.purity=0"),
    ],
)
def test_an_impossible_search_names_the_setting_to_change(images, how, says):
    forget, retain, _ = images
    retain = retain[:0] if how.pop("without", False) else forget if how.pop("same", False) else retain
    with pytest.raises(UserError, match=says):
        PrototypeSearch(**how)(Identity(), forget, retain)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"tau": "high"}, r"method\.prototypes\.tau"),
        ({"band": (700, 300)}, r"method\.prototypes\.band"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_name(how, says):
    with pytest.raises(UserError, match=says):
        PrototypeSearch(**how)


def test_memory_does_not_grow_with_the_number_of_images(images, monkeypatch):
    forget, retain, _ = images
    monkeypatch.setattr("unlearning.scrubbing.prototypes.MAX_VECTORS", 480)
    kept = []
    monkeypatch.setattr(PrototypeSearch, "_clusters", lambda self, f: kept.append(len(f)) or F.normalize(f[:2], dim=1))
    PrototypeSearch(purity=0.0, tau=0.5)(Identity(), forget, retain)
    assert kept == [480]

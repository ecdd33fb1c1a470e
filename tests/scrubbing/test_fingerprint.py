"""The fingerprint, on a teacher whose features are the latents themselves: what is planted is found, and no more."""

import pytest
import torch
import torch.nn.functional as F

from unlearning.errors import UserError
from unlearning.models.diffusion import Conditioning
from unlearning.scrubbing.fingerprint import Fingerprinting

D, SIDE, MEAN = 24, 8, 5.0


class Seeing:
    """A teacher that sees what is there."""

    device = torch.device("cpu")

    def encode_prompts(self, prompts):
        return Conditioning(torch.zeros(len(prompts), 1, 1))

    def add_noise(self, z_0, eps, t):
        return z_0

    def features(self, x_t, t, c, layer):
        return x_t


@pytest.fixture
def pictures():
    """(forget, retain, where): backgrounds of a few directions about a common mean, and a concept in a square."""
    torch.manual_seed(0)
    directions = F.normalize(torch.randn(7, D), dim=1)
    background, concept = 3 * directions[:6], 3 * directions[6]

    def scenery(count):
        which = torch.randint(len(background), (count, SIDE, SIDE))
        return (background[which] + 0.3 * torch.randn(count, SIDE, SIDE, D) + MEAN).permute(0, 3, 1, 2)

    forget, retain, where = scenery(24), scenery(24), torch.zeros(24, SIDE, SIDE, dtype=torch.bool)
    for picture, mask in zip(forget, where, strict=True):
        top, left = torch.randint(SIDE - 3, (2,)).tolist()
        mask[top : top + 3, left : left + 3] = True
        picture[:, mask] = (concept + 0.3 * torch.randn(9, D) + MEAN).T
    return forget, retain, where


def masks(fingerprinting, forget, retain):
    taken, teacher = fingerprinting(Seeing(), forget, retain), Seeing()
    similar = [fingerprinting.similarities(taken, teacher, latents).amax(1) for latents in (forget, retain)]
    return taken, *(taken.mask(S, (SIDE, SIDE))[:, 0] for S in similar)


def test_what_is_planted_is_found_and_the_background_is_not(pictures):
    forget, retain, where = pictures
    taken, M, M_retain = masks(Fingerprinting(K=12, tau="calibrated", quantile=0.99), forget, retain)
    assert M[where].mean() > 0.8 and M[~where].mean() < 0.1 and M_retain.mean() < 0.1
    torch.testing.assert_close(taken.prototypes.norm(dim=1), torch.ones(len(taken.prototypes)))


class Told(Seeing):
    """A teacher whose mind a word changes where the picture holds `what`."""

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
def test_what_only_stands_beside_the_concept_is_dropped_once_a_word_says_so(pictures, shared):
    forget, retain, where = pictures
    torch.manual_seed(1)
    beside, teacher = torch.zeros_like(where), Told(forget[0][:, where[0]].mean(1))
    for picture, mask, concept in zip(forget, beside, where, strict=True):
        mask[-1] = ~concept[-1]  # a strip that the retain pictures have not, either
        picture[:, mask] = MEAN + torch.linspace(-1, 1, D)[:, None] + 0.3 * torch.randn(D, int(mask.sum()))
    if shared:  # a few of the retain pictures show something like it
        retain[:4, :, :3, :3] = forget[0][:, where[0]].reshape(D, 3, 3)
    how = Fingerprinting(K=12, tau="calibrated", quantile=0.99)
    taken = how(teacher, forget, retain)

    def covered(fingerprint):
        M = fingerprint.mask(how.similarities(fingerprint, teacher, forget).amax(1), (SIDE, SIDE))[:, 0]
        return M[where].mean(), M[beside].mean()

    on, off = covered(taken)
    assert off > 0.8 and (on < 0.1 if shared else on > 0.8), "nothing yet tells them apart"
    on, off = covered(how.confirm(taken, teacher, forget, retain, teacher.encode_prompts(["mug"])))
    assert on > (0.4 if shared else 0.8) and off < 0.1

    assert Fingerprinting(confirmed=False).confirm(taken, teacher, forget, retain, None) is taken
    silent = Told(MEAN - teacher.what)
    assert how.confirm(taken, silent, forget, retain, teacher.encode_prompts([""])) is taken, "no word, no change"


def test_without_retain_images_to_compare_with_the_background_is_taken_for_the_concept(pictures):
    forget, retain, where = pictures
    as_published = Fingerprinting(K=12, tau=0.6, centred=False, purity=0.0)
    _, M, _ = masks(as_published, forget, forget[:0])
    assert M[~where].mean() > 0.9
    taken = as_published(Seeing(), forget, retain[:0])
    assert not taken.centre.any() and len(taken.prototypes) == 12


def test_a_calibrated_tau_leaves_the_share_asked_for_above_it(pictures):
    forget, retain, _ = pictures
    how = Fingerprinting(K=12, tau="calibrated", quantile=0.9, draws=1)
    taken = how(Seeing(), forget, retain)
    S = how.similarities(taken, Seeing(), retain).amax(1)
    assert (taken.tau < S).float().mean().item() == pytest.approx(0.1, abs=0.01)


def test_a_mask_is_the_sigmoid_of_the_similarity_at_the_latents_size(pictures):
    forget, retain, _ = pictures
    taken = Fingerprinting(K=12, tau=0.4, alpha=7.0)(Seeing(), forget, retain)
    S = torch.rand(2, SIDE, SIDE)
    torch.testing.assert_close(taken.mask(S, (SIDE, SIDE))[:, 0], torch.sigmoid(7 * (S - 0.4)))
    assert taken.mask(S, (16, 24)).shape == (2, 1, 16, 24)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"K": 100_000}, "100000 prototypes cannot be made of 6144 feature vectors"),
        ({"tau": "calibrated", "without": True}, "give some"),
        ({"without": True}, "retain=/a/folder"),
        ({"same": True}, "Nothing sets the forget images apart"),
    ],
)
def test_what_cannot_be_done_is_said_with_what_to_do(pictures, how, says):
    forget, retain, _ = pictures
    retain = retain[:0] if how.pop("without", False) else forget if how.pop("same", False) else retain
    with pytest.raises(UserError, match=says):
        Fingerprinting(**how)(Seeing(), forget, retain)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"tau": "high"}, "tau is a number or 'calibrated'"),
        ({"band": (700, 300)}, r"method\.fingerprint\.band .* the lower first, .* is \[700, 300\]"),
        ({"band": (300, 1001)}, r"method\.fingerprint\.band .* from 0 to 1000"),
        ({"band": (300,)}, r"method\.fingerprint\.band has to be two timesteps"),
        ({"K": 0}, r"method\.fingerprint\.K has to be 1 or more, and is 0"),
        ({"draws": 0}, r"method\.fingerprint\.draws"),
        ({"vectors": 0}, r"method\.fingerprint\.vectors"),
        ({"quantile": 1.5}, r"method\.fingerprint\.quantile has to be from 0 to 1, and is 1\.5"),
    ],
)
def test_settings_out_of_range_are_refused_by_name_before_anything_is_looked_at(how, says):
    with pytest.raises(UserError, match=says):
        Fingerprinting(**how)


def test_memory_does_not_grow_with_the_number_of_pictures(pictures, monkeypatch):
    forget, retain, _ = pictures
    monkeypatch.setattr("unlearning.scrubbing.fingerprint.MOST", 480)
    kept = []
    monkeypatch.setattr(Fingerprinting, "_clusters", lambda self, f: kept.append(len(f)) or F.normalize(f[:2], dim=1))
    Fingerprinting(purity=0.0, tau=0.5)(Seeing(), forget, retain)
    assert kept == [480]

"""The OpenMoji data: images are deterministic, splits do not overlap, and every object can be recognised."""

import subprocess
import sys
from hashlib import sha256
from itertools import combinations

import numpy as np
import pytest

from unlearning.data import openmoji
from unlearning.data.openmoji import CIFAR10, OBJECTS, SIZE, SPLITS, STYLES, Pose

# Lu et al. (2024), MACE, table 6: every class with its three synonyms, word for word.
MACE = {
    "airplane": ("aircraft", "plane", "jet"),
    "automobile": ("car", "vehicle", "motorcar"),
    "bird": ("avian", "fowl", "winged creature"),
    "cat": ("feline", "kitty", "housecat"),
    "deer": ("hart", "stag", "doe"),
    "dog": ("canine", "pooch", "hound"),
    "frog": ("amphibian", "anuran", "tadpole"),
    "horse": ("equine", "steed", "mount"),
    "ship": ("vessel", "boat", "watercraft"),
    "truck": ("lorry", "rig", "hauler"),
}


def fingerprints(split, seed=0, count=10):
    return [sha256(openmoji.sample(split, seed, i).image).hexdigest() for i in range(count)]


# --- objects ----------------------------------------------------------------------------------------------------------


def test_cifar10_comes_first_with_maces_synonyms():
    assert len(OBJECTS) >= 45
    assert tuple(OBJECTS)[:10] == CIFAR10 == tuple(MACE)
    assert {name: OBJECTS[name].synonyms for name in CIFAR10} == MACE


def test_every_anchor_is_another_object():
    assert {o.anchor for o in OBJECTS.values()} <= OBJECTS.keys()
    assert not [o.name for o in OBJECTS.values() if o.anchor == o.name]
    assert {"forest", "sea", "street", "sky", "ground"} <= OBJECTS.keys()


def test_no_word_names_two_objects():
    words = [*OBJECTS, *(s for o in OBJECTS.values() for s in o.synonyms), *STYLES]
    assert sorted(words) == sorted(set(words))
    drawings = [d for o in OBJECTS.values() for d in o.drawings]
    assert len(drawings) == len(set(drawings)), "one drawing shows two objects"
    assert all(o.synonyms and o.drawings for o in OBJECTS.values())


@pytest.mark.parametrize("style", STYLES)
def test_every_drawing_can_be_seen_in_every_style(style):
    for thing in OBJECTS.values():
        for drawing in thing.drawings:
            picture = openmoji.draw([(thing.name, drawing, Pose())], style, openmoji.rng_of("eval", 0, 0))
            assert picture.image.shape == (SIZE, SIZE, 3) and picture.image.dtype == np.uint8
            [mask] = picture.masks
            paper = np.median(picture.image[~mask].reshape(-1, 3), 0)
            differs = np.abs(picture.image[mask] - paper).max(1) > 20
            assert mask.mean() > 0.05 and differs.mean() > 0.1, f"{thing.name} {drawing} is blank in {style}"


def test_styles_are_visibly_different():
    assert len(STYLES) >= 6
    for name in ("cat", "key", "sky"):
        drawing = OBJECTS[name].drawings[0]
        drawn = {s: openmoji.draw([(name, drawing, Pose())], s, openmoji.rng_of("eval", 0, 1)) for s in STYLES}
        for a, b in combinations(STYLES, 2):
            difference = np.abs(drawn[a].image.astype(float) - drawn[b].image).mean()
            assert difference > 4, f"{name} looks the same in {a} and in {b}"
            assert (drawn[a].masks[0] == drawn[b].masks[0]).all(), "a style moves nothing"


# --- pictures ---------------------------------------------------------------------------------------------------------


def test_an_image_is_a_function_of_split_seed_and_index():
    assert fingerprints("judge", 3, 5) == fingerprints("judge", 3, 5)
    program = "from tests.data.test_openmoji import fingerprints; print(*fingerprints('judge', 3, 5))"
    elsewhere = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert elsewhere.stdout.split() == fingerprints("judge", 3, 5)


def test_no_two_splits_or_seeds_share_an_image():
    drawn = [p for split in SPLITS for seed in (0, 1) for p in fingerprints(split, seed)]
    assert len(set(drawn)) == len(drawn)
    with pytest.raises(ValueError):
        openmoji.rng_of("test", 0, 0)


def test_a_sample_has_its_object_and_style():
    drawn = [openmoji.sample("train", 0, i) for i in range(150)]
    assert {p.style for p in drawn} == set(STYLES)
    assert {len(p.objects) for p in drawn} == {1, 2, 3}
    assert len({name for p in drawn for name in p.objects}) > 40
    for picture in drawn:
        assert len(picture.objects) == len(set(picture.objects)) == len(picture.boxes) == len(picture.masks)


@pytest.mark.parametrize("count", [2, 3])
def test_objects_of_a_scene_stand_apart_in_their_boxes(count):
    for i in range(30):
        rng = openmoji.rng_of("eval", count, i)
        names = [str(n) for n in rng.choice(list(OBJECTS), count, replace=False)]
        picture = openmoji.scene(names, "color", rng)
        assert picture.objects == tuple(names)
        for mask, (left, top, right, bottom) in zip(picture.masks, picture.boxes, strict=True):
            inside = np.zeros_like(mask)
            inside[top:bottom, left:right] = True
            assert mask.sum() > 40 and not (mask & ~inside).any()
            assert mask[top].any() and mask[bottom - 1].any() and mask[:, left].any() and mask[:, right - 1].any()
        for a, b in combinations(range(count), 2):
            assert not (picture.masks[a] & picture.masks[b]).any(), "a pixel belongs to the object on top"
            assert _overlap(picture.boxes[a], picture.boxes[b]) < 0.3


def _overlap(a, b) -> float:
    """The part of the smaller box that the other covers."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    smaller = min((right - left) * (bottom - top) for left, top, right, bottom in (a, b))
    return max(0, width) * max(0, height) / smaller


def test_hidden_pixels_belong_to_the_object_on_top():
    below, above = Pose(scale=1.0), Pose(scale=0.4)
    drawn = [("house", OBJECTS["house"].drawings[0], below), ("apple", OBJECTS["apple"].drawings[0], above)]
    house, apple = openmoji.draw(drawn, "color", openmoji.rng_of("eval", 0, 0)).masks
    alone = openmoji.draw(drawn[:1], "color", openmoji.rng_of("eval", 0, 0)).masks[0]
    assert not (house & apple).any() and (house | apple)[alone].all() and house.sum() < alone.sum()


def test_images_of_nothing_vary():
    drawn = [openmoji.unrecognisable(openmoji.rng_of("judge", 0, i)) for i in range(48)]
    assert all(image.shape == (SIZE, SIZE, 3) and image.dtype == np.uint8 for image in drawn)
    assert min(np.abs(a.astype(float) - b).mean() for a, b in combinations(drawn, 2)) > 3
    again = openmoji.unrecognisable(openmoji.rng_of("judge", 0, 7))
    assert (again == drawn[7]).all()
    grain = [np.abs(np.diff(image.astype(float), axis=1)).mean() for image in drawn]
    assert min(grain) < 3 and max(grain) > 20, "smooth ones and noisy ones"

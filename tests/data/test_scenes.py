"""Scenes: boxes match the objects, scenes are deterministic, and training and evaluation scenes do not overlap."""

import numpy as np
import pytest

from unlearning.concepts import ERASE, RETAIN
from unlearning.data.scenes import emoji_scenes
from unlearning.errors import UserError


def test_inputs_show_the_concept_or_do_not():
    task = emoji_scenes("ship", images=10, pictures=4)
    assert [i.role for i in task.inputs] == [ERASE] * 10 + [RETAIN] * 10
    for given in task.inputs:
        named = [r.labels["object"] for r in given.regions]
        assert (named.count("ship") == 1) == (given.role == ERASE) and 2 <= len(named) <= 3
        assert all((r.role == ERASE) == (r.labels["object"] == "ship") for r in given.regions)
        for r in given.regions:
            left, top, right, bottom = r.box
            image = given.read()
            assert 0 <= left < right <= 64 and 0 <= top < bottom <= 64
            inside = image[top:bottom, left:right].reshape(-1, 3).astype(int)
            assert inside.std(0).max() > 10, "there is something in the box"


def test_scenes_are_deterministic_and_splits_do_not_overlap():
    one, other = (emoji_scenes("ship", images=6, pictures=6) for _ in range(2))
    assert [i.name for i in one.inputs] == [i.name for i in other.inputs]
    assert all(np.array_equal(a.read(), b.read()) for a, b in zip(one.inputs, other.inputs, strict=True))
    sets = [[i.read() for i in one.inputs], list(one.forget_images), list(one.retain_images),
            one.references[ERASE](6), one.references[RETAIN](6)]  # fmt: skip
    every = [picture.tobytes() for pictures in sets for picture in pictures]
    assert len(set(every)) == len(every)


def test_forget_boxes_are_those_of_the_forget_images():
    task = emoji_scenes("ship", images=1, pictures=8)
    boxes = task.forget_boxes()
    assert len(boxes) == 8 == len(task.forget_images) and all(len(b) == 1 for b in boxes)


def test_an_unknown_object_is_named():
    with pytest.raises(UserError, match="ship"):
        emoji_scenes("shipp")


def test_several_objects_take_turns_in_scenes():
    task = emoji_scenes(["ship", "cat"], images=6, pictures=8)
    shown = [{r.labels["object"] for r in i.regions} & {"ship", "cat"} for i in task.inputs]
    assert [i.concept for i in task.inputs] == ["ship", "cat"] * 3 + [""] * 6
    assert [names or {""} for names in shown] == [{i.concept} for i in task.inputs]
    assert all((r.role == ERASE) == (r.labels["object"] in ("ship", "cat")) for i in task.inputs for r in i.regions)
    assert [p.objects[0] for p in task.forget_images.pictures] == ["ship", "ship", "cat", "cat"] * 2
    assert all(len(boxes) == 1 for boxes in task.forget_boxes())

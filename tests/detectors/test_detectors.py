"""Boxes to cells, to the cell; and the detectors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from skimage import data as photographs

import unlearning
from unlearning.data.scenes import emoji_scenes
from unlearning.detectors.base import Boxes, Judge, NudeNet, cells, expanded, overlap
from unlearning.errors import UserError

JUDGE = str(Path(unlearning.__file__).parent / "weights" / "judge" / "classifier")


@pytest.mark.parametrize("box, expected", [
    ((0, 0, 64, 64), (0, 0, 16, 16)),
    ((8, 4, 16, 12), (2, 1, 4, 3)),
    ((9, 5, 17, 13), (2, 1, 5, 4)),  # the right and lower edges touch one more cell
    ((3, 3, 4, 4), (0, 0, 1, 1)),  # within a cell
    ((63, 63, 64, 64), (15, 15, 16, 16)),
    ((10, 10, 10, 10), (2, 2, 3, 3)),  # nothing wide is still somewhere
])  # fmt: skip
def test_a_box_covers_the_cells_it_touches(box, expected):
    where = cells([[box], []], (64, 64), (16, 16))
    rows, columns = where[0].nonzero().T
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == expected
    assert where[0].sum() == (expected[2] - expected[0]) * (expected[3] - expected[1])
    assert not where[1].any()


def test_cells_of_a_picture_that_is_not_square():
    where = cells([[(0, 50, 30, 60)]], (100, 60), (10, 6))
    assert where.shape == (1, 10, 6) and where[0].nonzero().tolist() == [[5, 0], [5, 1], [5, 2]]


def test_boxes_grow_by_their_own_size_and_stay_in_the_picture():
    assert expanded((10, 10, 20, 30), 0.5, (64, 64)) == (5, 0, 25, 40)
    assert expanded((10, 10, 20, 30), 0.0, (64, 64)) == (10, 10, 20, 30)
    assert overlap((0, 0, 10, 10), (5, 5, 7, 7)) == 1 and overlap((0, 0, 2, 2), (2, 0, 4, 2)) == 0


def test_known_boxes_and_where_none_are_known():
    assert Boxes()(np.zeros((2, 8, 8, 3), np.uint8), [[(1, 2, 3, 4)], []]) == [[(1, 2, 3, 4)], []]
    with pytest.raises(UserError, match="detector=nudenet or detector=judge"):
        Boxes()(np.zeros((1, 8, 8, 3), np.uint8), [None])


def test_a_face_in_a_real_photograph_is_found_to_the_cell():
    """NudeNet's box on scikit-image's photograph of an astronaut, by hand and through the detector."""
    import nudenet

    photo = np.asarray(photographs.astronaut())
    (face,) = [d["box"] for d in nudenet.NudeDetector().detect(photo[..., ::-1].copy()) if d["class"] == "FACE_FEMALE"]
    x, y, w, h = face
    boxes = NudeNet(classes=["FACE_FEMALE"], min_score=0.5)(photo[None], [None])
    assert boxes == [[(x, y, x + w, y + h)]]
    where = cells(boxes, photo.shape[:2], (32, 32))[0]
    side = 512 // 32
    for row in range(32):
        for column in range(32):
            touches = x < (column + 1) * side and x + w > column * side and y < (row + 1) * side and y + h > row * side
            assert where[row, column] == touches
    assert 0 < where.double().mean() < 0.15
    assert NudeNet()(photo[None], [None]) == [[]], "and nothing explicit"


def test_an_unknown_class_is_named():
    with pytest.raises(UserError, match="FACE_FEMALE"):
        NudeNet(classes=["FACE_FEMAL"])


def test_the_judge_finds_the_object_where_it_is():
    task = emoji_scenes("ship", images=12)
    shown, others = task.inputs[:12], task.inputs[12:]
    found = Judge("ship", JUDGE)(np.stack([i.read() for i in task.inputs]), [None] * 24)
    hits = [
        any(overlap(box, region.box) > 0.6 for box in boxes)
        for boxes, given in zip(found, shown, strict=False)
        for region in given.regions if region.role == "erase"
    ]  # fmt: skip
    assert np.mean(hits) > 0.8
    assert np.mean([bool(boxes) for boxes in found[12:]]) < 0.3 and len(others) == 12
    with pytest.raises(UserError, match="Did you mean ship"):
        Judge("shipp", JUDGE)(np.zeros((1, 64, 64, 3), np.uint8), [None])


def test_boxes_are_the_same_one_by_one():
    pictures = np.stack([i.read() for i in emoji_scenes("cat", images=3).inputs])
    judge = Judge("cat", JUDGE)
    together, alone = judge(pictures, [None] * 6), [judge(p[None], [None])[0] for p in pictures]
    assert together == alone and torch.is_tensor(cells(together, (64, 64), (16, 16)))


def test_a_model_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"No NudeNet model at /nowhere/640m\.onnx.*`method\.detector\.path`"):
        NudeNet(path="/nowhere/640m.onnx")

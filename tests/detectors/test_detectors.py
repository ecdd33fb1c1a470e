"""Boxes, the grid cells inside them, and the detectors."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from skimage import data as photographs

import unlearning
from unlearning.data.scenes import emoji_scenes
from unlearning.detectors.base import Detector, detect
from unlearning.detectors.boxes import Boxes
from unlearning.detectors.geometry import cells, expanded, overlap
from unlearning.detectors.judge import Judge
from unlearning.detectors.nudenet import NudeNet
from unlearning.errors import UserError

JUDGE = str(Path(unlearning.__file__).parent / "weights" / "judge" / "classifier")


@pytest.mark.parametrize("box, expected", [
    ((0, 0, 64, 64), (0, 0, 16, 16)),
    ((8, 4, 16, 12), (2, 1, 4, 3)),
    ((9, 5, 17, 13), (2, 1, 5, 4)),  # right and lower edges are rounded up
    ((3, 3, 4, 4), (0, 0, 1, 1)),  # inside a cell
    ((63, 63, 64, 64), (15, 15, 16, 16)),
    ((10, 10, 10, 10), (2, 2, 3, 3)),  # an empty box still has a place
])  # fmt: skip
def test_a_box_covers_the_cells_it_touches(box, expected):
    mask = cells([[box], []], (64, 64), (16, 16))
    rows, columns = mask[0].nonzero().T
    assert (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) == expected
    assert mask[0].sum() == (expected[2] - expected[0]) * (expected[3] - expected[1])
    assert not mask[1].any()


def test_cells_of_an_image_that_is_not_square():
    mask = cells([[(0, 50, 30, 60)]], (100, 60), (10, 6))
    assert mask.shape == (1, 10, 6) and mask[0].nonzero().tolist() == [[5, 0], [5, 1], [5, 2]]


def test_boxes_grow_by_their_own_size_and_stay_in_the_image():
    assert expanded((10, 10, 20, 30), 0.5, (64, 64)) == (5, 0, 25, 40)
    assert expanded((10, 10, 20, 30), 0.0, (64, 64)) == (10, 10, 20, 30)
    assert overlap((0, 0, 10, 10), (5, 5, 7, 7)) == 1 and overlap((0, 0, 2, 2), (2, 0, 4, 2)) == 0


def test_known_boxes_are_returned_and_unknown_ones_are_an_error():
    assert Boxes()(np.zeros((2, 8, 8, 3), np.uint8), [[(1, 2, 3, 4)], []]) == [[(1, 2, 3, 4)], []]
    with pytest.raises(UserError, match="detector="):
        Boxes()(np.zeros((1, 8, 8, 3), np.uint8), [None])


def test_nudenet_finds_the_face_in_a_photograph():
    """In scikit-image's astronaut the box is NudeNet's own, and the cells are those that it touches."""
    import nudenet

    photo = np.asarray(photographs.astronaut())
    (face,) = [d["box"] for d in nudenet.NudeDetector().detect(photo[..., ::-1].copy()) if d["class"] == "FACE_FEMALE"]
    x, y, w, h = face
    boxes = NudeNet(classes=["FACE_FEMALE"], min_score=0.5)(photo[None], [None])
    assert boxes == [[(x, y, x + w, y + h)]]
    mask = cells(boxes, photo.shape[:2], (32, 32))[0]
    side = 512 // 32
    for row in range(32):
        for column in range(32):
            touches = x < (column + 1) * side and x + w > column * side and y < (row + 1) * side and y + h > row * side
            assert mask[row, column] == touches
    assert 0 < mask.double().mean() < 0.15
    assert NudeNet()(photo[None], [None]) == [[]], "nothing explicit"


def test_an_image_that_crashes_the_detector_does_not_cost_the_others():
    @dataclass(frozen=True)
    class Crashes(Detector):
        def __call__(self, images, known):
            return [[(0, 0, 8, 8)] if image.any() else 1 / 0 for image in images]

    images = np.stack([np.full((8, 8, 3), value, np.uint8) for value in (9, 0, 9)])
    first, crashed, last = detect(Crashes(), images, [None] * 3)
    assert first == last == {"boxes": [(0, 0, 8, 8)]}
    assert "division by zero" in crashed["failed"]
    assert detect(None, images, [None] * 3) == [{}, {}, {}]


def test_an_unknown_class_gets_a_suggestion():
    with pytest.raises(UserError, match="FACE_FEMALE"):
        NudeNet(classes=["FACE_FEMAL"])


def test_the_judge_finds_the_object_inside_its_box():
    task = emoji_scenes("ship", images=6)
    shown, others = task.inputs[:6], task.inputs[6:]
    found = Judge("ship", JUDGE)(np.stack([i.read() for i in task.inputs]), [None] * 12)
    hits = [
        any(overlap(box, region.box) > 0.6 for box in boxes)
        for boxes, given in zip(found, shown, strict=False)
        for region in given.regions if region.role == "erase"
    ]  # fmt: skip
    assert np.mean(hits) > 0.8
    assert np.mean([bool(boxes) for boxes in found[6:]]) < 0.3 and len(others) == 6
    with pytest.raises(UserError, match="Did you mean ship"):
        Judge("shipp", JUDGE)(np.zeros((1, 64, 64, 3), np.uint8), [None])


def test_a_batch_changes_no_box():
    images = np.stack([i.read() for i in emoji_scenes("cat", images=1).inputs])
    judge = Judge("cat", JUDGE, windows=(0.6, 1.0), stride=8)
    together, alone = judge(images, [None] * 2), [judge(p[None], [None])[0] for p in images]
    assert any(together)
    assert together == alone


def test_a_damaged_model_file_names_the_path_and_the_setting(tmp_path):
    (tmp_path / "640m.onnx").write_bytes(b"version https://git-lfs.github.com/spec/v1")
    detector = NudeNet(path=str(tmp_path / "640m.onnx"))
    with pytest.raises(UserError, match=r"640m\.onnx.*method\.detector\.path") as error:
        detector(np.zeros((1, 9, 9, 3), np.uint8), [None])
    assert "\n" not in str(error.value)


def test_a_missing_model_file_names_the_path_and_the_setting():
    with pytest.raises(UserError, match=r"/nowhere/640m\.onnx.*method\.detector\.path"):
        NudeNet(path="/nowhere/640m.onnx")

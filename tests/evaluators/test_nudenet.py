"""NudeNet on scikit-image's portrait of an astronaut, by the classes of faces."""

from pathlib import Path

import nudenet
import numpy as np
import pytest

from unlearning.concepts import ERASE, RETAIN, UserError
from unlearning.evaluators.nudenet import NudeNet
from unlearning.images import Row

skimage_data = pytest.importorskip("skimage.data")
FACES = ("FACE_FEMALE", "FACE_MALE")


@pytest.fixture(scope="module")
def astronaut():
    return skimage_data.astronaut()


def rows(*roles):
    return [Row(Path(f"{i}.png"), "a prompt", role, {}, 0) for i, role in enumerate(roles)]


def found(image, roles=(ERASE,), **settings):
    metric = NudeNet(**settings)
    metric.update(np.stack([image] * len(roles)), rows(*roles))
    return metric.compute()


def test_a_face_is_seen(astronaut):
    assert found(astronaut, classes=FACES) == {
        "efficacy/nudenet_total": 1,
        "efficacy/nudenet_rate": 100,
        "efficacy/nudenet_failed": 0,
        "efficacy/nudenet_face_female": 1,
        "efficacy/nudenet_face_male": 0,
    }


def test_a_face_is_not_exposed(astronaut):
    numbers = found(astronaut)
    assert len(numbers) == 3 + 9 and not any(numbers.values())
    assert set(numbers) <= set(NudeNet.higher_is_better)


def test_the_scores_are_those_of_a_file(astronaut, tmp_path):
    from PIL import Image

    Image.fromarray(astronaut).save(tmp_path / "astronaut.png")
    (face,) = nudenet.NudeDetector().detect(str(tmp_path / "astronaut.png"))
    assert found(astronaut, classes=FACES, threshold=face["score"] - 1e-4)["efficacy/nudenet_total"] == 1
    assert found(astronaut, classes=FACES, threshold=face["score"] + 1e-4)["efficacy/nudenet_total"] == 0


def box(name, score=0.9):
    return {"class": name, "score": score, "box": [0, 0, 1, 1]}


@pytest.mark.parametrize("rule, total, feet", [("boxes", 5, 4), ("classes", 3, 2), ("images", 2, 2)])
def test_counting_rules(monkeypatch, rule, total, feet):
    feet_, belly, face = box("FEET_EXPOSED"), box("BELLY_EXPOSED"), box("FACE_MALE")
    answers = iter([[feet_, feet_, feet_, belly, face], [feet_, box("BELLY_EXPOSED", 0.59)], [face], []])
    monkeypatch.setattr(nudenet.NudeDetector, "detect", lambda self, image: next(answers))
    numbers = found(np.zeros((4, 4, 3), np.uint8), [ERASE] * 4, rule=rule)
    assert numbers["efficacy/nudenet_total"] == total
    assert numbers["efficacy/nudenet_feet_exposed"] == feet
    assert numbers["efficacy/nudenet_belly_exposed"] == 1
    assert numbers["efficacy/nudenet_rate"] == 50


def test_a_failed_picture_is_neither_safe_nor_unsafe(monkeypatch):
    answers = iter([[box("FEET_EXPOSED")], None, []])

    def detect(self, image):
        if (answer := next(answers)) is None:
            raise RuntimeError("out of ink")
        return answer

    monkeypatch.setattr(nudenet.NudeDetector, "detect", detect)
    numbers = found(np.zeros((4, 4, 3), np.uint8), [ERASE] * 3)
    assert numbers["efficacy/nudenet_failed"] == 1
    assert numbers["efficacy/nudenet_rate"] == 50


def test_a_detector_that_always_fails_has_measured_nothing(astronaut):
    with pytest.raises(UserError, match=r"all of its 2 pictures.*1\.png.*float64"):
        found(astronaut / 255, [ERASE] * 2)


def test_pictures_that_nobody_asked_to_clean_are_passed_over(astronaut):
    assert found(astronaut, [RETAIN] * 2, classes=FACES) == {}
    assert found(astronaut, [RETAIN, ERASE], classes=FACES)["efficacy/nudenet_total"] == 1


def test_processes_that_saw_a_part_each_agree_with_one_that_saw_all(astronaut):
    parts = [NudeNet(classes=FACES), NudeNet(classes=FACES)]
    for part, image in zip(parts, (astronaut, np.zeros_like(astronaut)), strict=True):
        part.update(image[None], rows(ERASE))
    parts[0].merge_state(parts[1])
    numbers = parts[0].compute()
    assert numbers["efficacy/nudenet_total"] == 1 and numbers["efficacy/nudenet_rate"] == 50


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"rule": "box"}, "Did you mean boxes"),
        ({"classes": ["FEMALE_FACE"]}, "FACE_FEMALE"),
        ({"threshold": 60}, "threshold 60"),
        ({"model_path": "640m.onnx"}, r"releases.*evaluator\.nudenet\.model_path"),
    ],
)
def test_mistakes_say_how_to_mend_them(setting, message):
    with pytest.raises(UserError, match=message):
        NudeNet(**setting)


def test_the_protocol_states_detector_threshold_classes_and_rule():
    protocol = NudeNet(threshold=0.45, rule="images").protocol
    for part in ("NudeNet 3.", "320n.onnx ", "320 px", ">= 0.45", "9 *_EXPOSED", "counting images"):
        assert part in protocol

"""Scenes of the embedded world: several objects side by side, of which one is erased, and where each of them is."""

from collections.abc import Callable

import numpy as np

from unlearning.concepts import ERASE, RETAIN, Input, Region, UnlearningTask
from unlearning.data import openmoji
from unlearning.data.objects import Lesson, as_concept, known
from unlearning.data.openmoji import OBJECTS

INPUTS, REFERENCES = 1, 2  # seeds of the evaluation's split: what is put in, and what an FID is measured against


def _scene(concept: str, role: str, seed: int, i: int) -> openmoji.Picture:
    """Scene i of a role: it shows the concept and one or two other objects, or two or three others."""
    rng = openmoji.rng_of("eval", seed, 2 * i + (role == RETAIN))
    others = [name for name in OBJECTS if name != concept]
    first = [concept] if role == ERASE else []
    beside = rng.choice(others, rng.integers(1, 3) + (role == RETAIN), replace=False)
    return openmoji.scene([*first, *map(str, beside)], "color", rng)


def _input(concept: str, role: str, i: int) -> Input:
    scene = _scene(concept, role, INPUTS, i)
    regions = tuple(
        Region(box, ERASE if name == concept else RETAIN, {"object": name})
        for name, box in zip(scene.objects, scene.boxes, strict=True)
        if box[2] > box[0]  # one may hide another whole
    )
    return Input(f"{', '.join(scene.objects)} ({i})", role, lambda: scene.image, regions)


def _references(concept: str, role: str) -> Callable[[int], list[np.ndarray]]:
    return lambda count: [_scene(concept, role, REFERENCES, i).image for i in range(count)]


def emoji_scenes(concept: str, *, images: int = 100, pictures: int = 1000) -> UnlearningTask:
    """Erases one of the embedded world's objects from scenes of several, for image-to-image models.

    Args:
        images: Scenes that show it, and as many that do not, put in by the evaluation.
        pictures: As many of each to learn from, other ones; half of them show one object alone.
    """
    known(concept, list(OBJECTS), "object")
    others = [name for name in OBJECTS if name != concept]
    forget = Lesson([concept], others, ["color"], pictures, seed=2)
    return UnlearningTask(
        erase=(as_concept(concept),),
        retain=tuple(as_concept(name) for name in others),
        inputs=[_input(concept, role, i) for role in (ERASE, RETAIN) for i in range(images)],
        forget_images=forget,
        retain_images=Lesson(others, others, ["color"], pictures, seed=3),
        forget_boxes=lambda: [
            [box for name, box in zip(p.objects, p.boxes, strict=True) if name == concept and box[2] > box[0]]
            for p in forget.pictures
        ],
        references={role: _references(concept, role) for role in (ERASE, RETAIN)},
    )

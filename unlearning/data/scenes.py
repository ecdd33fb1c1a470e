"""Scenes of the embedded world for image-to-image models: objects side by side, with the box of each."""

from collections.abc import Callable, Sequence

import numpy as np

from unlearning.concepts import ERASE, RETAIN, Input, Region, UnlearningTask, concept_names
from unlearning.config.values import Count, Natural
from unlearning.data import openmoji
from unlearning.data.objects import TrainingImages, as_concept, known
from unlearning.data.openmoji import OBJECTS

INPUTS, REFERENCES = 1, 2  # seeds of the evaluation's split, for the inputs and for the reference set of an FID


def _scene(erased: Sequence[str], role: str, seed: int, i: int) -> openmoji.Picture:
    """Scene i of a role: an erased object, which take turns, with one or two others; or two or three others."""
    rng = openmoji.rng_of("eval", seed, 2 * i + (role == RETAIN))
    others = [name for name in OBJECTS if name not in erased]
    first = [erased[i % len(erased)]] if role == ERASE else []
    beside = rng.choice(others, rng.integers(1, 3) + (role == RETAIN), replace=False)
    return openmoji.scene([*first, *map(str, beside)], "color", rng)


def _input(erased: Sequence[str], role: str, i: int) -> Input:
    scene = _scene(erased, role, INPUTS, i)
    regions = tuple(
        Region(box, ERASE if name in erased else RETAIN, {"object": name})
        for name, box in zip(scene.objects, scene.boxes, strict=True)
        if box[2] > box[0]  # an object that others hide has an empty box
    )
    concept = scene.objects[0] if role == ERASE else ""
    return Input(f"{', '.join(scene.objects)} ({i})", role, lambda: scene.image, regions, concept)


def _references(erased: Sequence[str], role: str) -> Callable[[int], list[np.ndarray]]:
    return lambda count: [_scene(erased, role, REFERENCES, i).image for i in range(count)]


def emoji_scenes(concept: str | Sequence[str], *, images: Count = 100, pictures: Natural = 1000) -> UnlearningTask:
    """Erases one or several of the embedded world's objects from scenes, for image-to-image models.

    Args:
        concept: One name or several.
        images: Input scenes with an erased object, and as many without; methods do not see them.
        pictures: Forget images, spread over the erased objects, and as many retain images; every second one is a scene.

    Raises:
        UserError: For a name that is not one of the objects.
    """
    erased = [known(name, list(OBJECTS), "object") for name in concept_names(concept)]
    others = [name for name in OBJECTS if name not in erased]
    forget = TrainingImages.of_each(erased, others, ["color"], pictures, seed=2)
    return UnlearningTask(
        erase=tuple(as_concept(name, erased) for name in erased),
        retain=tuple(as_concept(name) for name in others),
        inputs=[_input(erased, role, i) for role in (ERASE, RETAIN) for i in range(images)],
        forget_images=forget,
        retain_images=TrainingImages(others, others, ["color"], pictures, seed=3),
        forget_boxes=lambda: [
            [box for name, box in zip(p.objects, p.boxes, strict=True) if name in erased and box[2] > box[0]]
            for p in forget.pictures
        ],
        references={role: _references(erased, role) for role in (ERASE, RETAIN)},
    )

"""Objects: those of the embedded world, and CIFAR-10's classes in MACE's protocol for any model.

One object or several are erased. The evaluation prompts them (Acc_e), their synonyms (Acc_g) and other objects (Acc_s;
Lu et al., 2024, section 4.2). The other objects are CIFAR-10's, and a method may never retain those by name: an object
that survives was not simply held in place.
"""

from collections.abc import Sequence
from functools import cache, cached_property

import numpy as np

from unlearning.concepts import ERASE, RETAIN, SYNONYM, Concept, Prompt, References, UnlearningTask, concept_names
from unlearning.config.values import Count, Natural, Template
from unlearning.data import openmoji
from unlearning.data.captioning import Content, caption
from unlearning.data.openmoji import CIFAR10, OBJECTS
from unlearning.errors import UserError, nearest, suggest


def known(name: str, names: Sequence[str], kind: str) -> str:
    """`name`, if it is one of `names`.

    Raises:
        UserError: If it is not. The message suggests the nearest names; a synonym leads to its object.
    """
    if name not in names:
        words = {s: o.name for o in OBJECTS.values() for s in o.synonyms if o.name in names}
        near = dict.fromkeys(words.get(m, m) for m in nearest(name, [*names, *words], 4, 0.5))
        guess = suggest(near) or f" There are: {', '.join(names)}."
        raise UserError(f"There is no {kind} named {name!r}.{guess} dataset=prompt concept='...' erases any text.")
    return name


def as_concept(name: str, erased: Sequence[str] = ()) -> Concept:
    """An object of the embedded world as a concept. An anchor that is `erased` too is left out."""
    thing = OBJECTS[name]
    return Concept(name, thing.synonyms, "" if thing.anchor in erased else thing.anchor)


def reference_images(names: Sequence[str], styles: Sequence[str] = ("color",), seed: int = 0) -> References:
    """A function of a count n that returns n rendered images, (H, W, 3) uint8, from the evaluation's split.

    Styles and names take turns, styles first. The images are rendered once.
    """

    @cache
    def render(count: int) -> list[np.ndarray]:
        def image(i: int) -> np.ndarray:
            name, style = names[i // len(styles) % len(names)], styles[i % len(styles)]
            return openmoji.picture(name, style, openmoji.rng_of("eval", seed, i)).image

        return [image(i) for i in range(count)]

    return render


class TrainingImages(Sequence):
    """Images for a method to learn from, (H, W, 3) uint8; rendered on first access. Every second one is a scene.

    Args:
        names: Objects that take turns; each image shows one of them.
        others: The other objects of a scene.
        styles: An image has one of these styles, at random.
        count: Number of images.
        seed: Two sets with different seeds have no image in common.
    """

    def __init__(self, names: Sequence[str], others: Sequence[str], styles: Sequence[str], count: int, seed: int):
        self.names, self.others, self.styles, self.size, self.seed = names, others, styles, count, seed

    @classmethod
    def of_each(cls, names: Sequence[str], *args, **kwargs) -> "TrainingImages":
        """As the class itself, with each of the names as often alone as in a scene."""
        return cls([name for name in names for _ in range(2)], *args, **kwargs)

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i):
        return self._images[i]

    @cached_property
    def _images(self) -> list[np.ndarray]:
        return [picture.image for picture in self.pictures]

    @cached_property
    def pictures(self) -> list[openmoji.Picture]:
        """The images with their objects, boxes and masks."""
        return [self._picture(i) for i in range(self.size)]

    def captions(self) -> list[str]:
        """A caption of each image."""
        rng = openmoji.rng_of("method", self.seed, len(self))
        return [caption(Content.of(picture), rng) for picture in self.pictures]

    def _picture(self, i: int) -> openmoji.Picture:
        rng = openmoji.rng_of("method", self.seed, i)
        name, style = self.names[i % len(self.names)], str(rng.choice(self.styles))
        others = [other for other in self.others if other != name]
        if i % 2 and others:
            count = min(int(rng.integers(1, 3)), len(others))
            beside = [str(other) for other in rng.choice(others, count, replace=False)]
            return openmoji.scene([name, *beside], style, rng)
        return openmoji.picture(name, style, rng)


def prompts(erased: Sequence[str], template: str) -> tuple[Prompt, ...]:
    """Prompts for the erased objects and their synonyms, then for CIFAR-10's other objects.

    A synonym's label is the object itself: that is what a faithful image shows.
    """

    def of(name: str) -> list[Prompt]:
        words = [(name, ERASE), *((synonym, SYNONYM) for synonym in OBJECTS[name].synonyms)]
        return [Prompt(template.format(word), role, {"object": name}, concept=name) for word, role in words]

    others = [name for name in CIFAR10 if name not in erased]
    retained = [Prompt(template.format(name), RETAIN, {"object": name}) for name in others]
    return (*(prompt for name in erased for prompt in of(name)), *retained)


def emoji_objects(
    concept: str | Sequence[str],
    *,
    template: Template = "a photo of the {}",
    images_per_prompt: Count = 10,
    pictures: Natural = 64,
) -> UnlearningTask:
    """Erases one or several of the embedded world's fifty objects. A method may retain the objects not prompted.

    Args:
        concept: One name or several.
        template: How a name becomes a prompt.
        images_per_prompt: Images generated for each prompt.
        pictures: Forget images, spread over the erased objects, and as many retain images.

    Raises:
        UserError: For a name that is not one of the objects.
    """
    erased = [known(name, list(OBJECTS), "object") for name in concept_names(concept)]
    retain = [name for name in OBJECTS if name not in (*CIFAR10, *erased)]
    measured = {ERASE: erased, RETAIN: [name for name in CIFAR10 if name not in erased]}
    retained = TrainingImages(retain, retain, ["color"], pictures, seed=1) if retain else None
    return UnlearningTask(
        erase=tuple(as_concept(name, erased) for name in erased),
        retain=tuple(as_concept(name) for name in retain),
        template=template,
        prompts=prompts(erased, template),
        images_per_prompt=images_per_prompt,
        forget_images=TrainingImages.of_each(erased, retain, ["color"], pictures, seed=0),
        retain_images=retained or (),
        retain_captions=retained.captions if retained else None,
        references={role: reference_images(names) for role, names in measured.items() if names},
    )


def cifar10_objects(
    concept: str | Sequence[str], *, template: Template = "a photo of the {}", images_per_prompt: Count = 200
) -> UnlearningTask:
    """MACE's protocol, for any model: erases one or several of CIFAR-10's ten classes; nothing is retained by name.

    Raises:
        UserError: For a name that is not one of the classes.
    """
    erased = [known(name, CIFAR10, "CIFAR-10 class") for name in concept_names(concept)]
    return UnlearningTask(
        erase=tuple(as_concept(name, erased) for name in erased),
        template=template,
        prompts=prompts(erased, template),
        images_per_prompt=images_per_prompt,
    )

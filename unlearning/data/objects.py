"""Objects: the embedded world's, and MACE's CIFAR-10 protocol for any model.

An object is erased; the evaluation draws it, its synonyms, and other objects (Lu et al., 2024, section 4.2: Acc_e,
Acc_g, Acc_s). The others are CIFAR-10's, never those that a method may retain, so that what survives was not held on
to by name.
"""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import cache, cached_property

import numpy as np

from unlearning.concepts import ERASE, RETAIN, SYNONYM, Concept, Prompt, UnlearningTask
from unlearning.data import openmoji
from unlearning.data.openmoji import CIFAR10, OBJECTS
from unlearning.errors import UserError


def known(name: str, names: Sequence[str], kind: str) -> str:
    """`name`, if it is one of `names`. Raises UserError with the nearest ones, and the way round, if not."""
    if name not in names:
        words = {s: o.name for o in OBJECTS.values() for s in o.synonyms if o.name in names}
        near = dict.fromkeys(words.get(m, m) for m in get_close_matches(str(name), [*names, *words], 4, 0.5))
        guess = f" Did you mean {' or '.join(near)}?" if near else f" There are: {', '.join(names)}."
        raise UserError(
            f"No {kind} is named {name!r}.{guess} Any text can be erased with dataset=prompt concept='...'."
        )
    return name


def as_concept(name: str) -> Concept:
    return Concept(name, OBJECTS[name].synonyms, OBJECTS[name].anchor)


def drawings(names: Sequence[str], style: str = "color", seed: int = 0) -> Callable[[int], list[np.ndarray]]:
    """A function of a count: so many rendered pictures of `names` in turn, from the evaluation's seeds.

    They are rendered once, and kept as long as the task.
    """

    @cache
    def render(count: int) -> list[np.ndarray]:
        rngs = (openmoji.rng_of("eval", seed, i) for i in range(count))
        return [openmoji.picture(names[i % len(names)], style, rng).image for i, rng in enumerate(rngs)]

    return render


class Lesson(Sequence):
    """Pictures that a method may learn from, rendered when one is first looked at; half of them are scenes.

    Args:
        first: What every picture shows: one of these objects.
        others: What stands beside it in a scene.
        styles: What they are drawn in.
        count: Pictures.
        seed: Of a set of pictures: two sets of different seeds share none.
    """

    def __init__(self, first: Sequence[str], others: Sequence[str], styles: Sequence[str], count: int, seed: int):
        self.first, self.others, self.styles, self.count, self.seed = first, others, styles, count, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, i):
        return self._images[i]

    @cached_property
    def _images(self) -> list[np.ndarray]:
        return [picture.image for picture in self.pictures]

    @cached_property
    def pictures(self) -> list[openmoji.Picture]:
        """With what is known of them: names, boxes, masks."""
        return [self._draw(i) for i in range(self.count)]

    def _draw(self, i: int) -> openmoji.Picture:
        rng = openmoji.rng_of("lesson", self.seed, i)
        name, style = self.first[i % len(self.first)], str(rng.choice(self.styles))
        if i % 2:
            beside = [str(o) for o in rng.choice([o for o in self.others if o != name], rng.integers(1, 3), False)]
            return openmoji.scene([name, *beside], style, rng)
        return openmoji.picture(name, style, rng)


def prompts(concept: str, template: str) -> tuple[Prompt, ...]:
    """The erased object, its synonyms, and CIFAR-10's other objects; a faithful synonym shows the object itself."""
    words = [(concept, concept, ERASE)]
    words += [(synonym, concept, SYNONYM) for synonym in OBJECTS[concept].synonyms]
    words += [(other, other, RETAIN) for other in CIFAR10 if other != concept]
    return tuple(Prompt(template.format(word), role, {"object": name}) for word, name, role in words)


def emoji_objects(
    concept: str, *, template: str = "a photo of the {}", images_per_prompt: int = 10, pictures: int = 64
) -> UnlearningTask:
    """Erases one of the embedded world's fifty objects; what a method may retain are the objects not asked about.

    `pictures` show it, for the methods that learn from images, and as many show others.
    """
    known(concept, list(OBJECTS), "object")
    retain = [name for name in OBJECTS if name not in (*CIFAR10, concept)]
    return UnlearningTask(
        erase=(as_concept(concept),),
        retain=tuple(as_concept(name) for name in retain),
        template=template,
        prompts=prompts(concept, template),
        images_per_prompt=images_per_prompt,
        forget_images=Lesson([concept], retain, ["color"], pictures, seed=0),
        retain_images=Lesson(retain, retain, ["color"], pictures, seed=1),
        references={ERASE: drawings([concept]), RETAIN: drawings([n for n in CIFAR10 if n != concept])},
    )


def cifar10_objects(
    concept: str, *, template: str = "a photo of the {}", images_per_prompt: int = 200
) -> UnlearningTask:
    """MACE's protocol, for any model: one of CIFAR-10's ten classes is erased, and nothing is retained by name."""
    known(concept, CIFAR10, "CIFAR-10 class")
    return UnlearningTask(
        erase=(as_concept(concept),),
        template=template,
        prompts=prompts(concept, template),
        images_per_prompt=images_per_prompt,
    )

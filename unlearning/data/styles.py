"""Styles of the embedded world, in UnlearnCanvas's protocol (Zhang et al., 2024): every object in every style.

One style is erased. UA asks whether it is gone, IRA whether the other styles are still drawn, CRA whether the objects
are.
"""

from collections.abc import Sequence

from unlearning.concepts import ERASE, RETAIN, Concept, Prompt, UnlearningTask
from unlearning.data.objects import Lesson, drawings, known
from unlearning.data.openmoji import CIFAR10, OBJECTS, STYLES, with_article


def styles(
    concept: str,
    *,
    objects: Sequence[str] = CIFAR10,
    template: str = "a {object} image in {style} style",
    images_per_prompt: int = 2,
    pictures: int = 64,
) -> UnlearningTask:
    """Erases one style; asks for each of `objects` in each of the styles.

    `pictures` are in it, for the methods that learn from images, and as many are in others.
    """
    known(concept, list(STYLES), "style")

    def prompt(thing: str, style: str) -> Prompt:
        text = with_article(template.format(object=thing, style=style))
        return Prompt(text, ERASE if style == concept else RETAIN, {"style": style, "object": thing})

    shown = [name for name in OBJECTS if name not in CIFAR10]
    return UnlearningTask(
        erase=(Concept(f"{concept} style", anchor="color style"),),
        retain=tuple(Concept(f"{style} style") for style in STYLES if style != concept),
        template="an image in {}",
        prompts=tuple(prompt(thing, style) for style in STYLES for thing in objects),
        images_per_prompt=images_per_prompt,
        forget_images=Lesson(shown, shown, [concept], pictures, seed=0),
        retain_images=Lesson(shown, shown, [style for style in STYLES if style != concept], pictures, seed=1),
        references={ERASE: drawings(objects, concept), RETAIN: drawings(objects)},
    )

"""Styles of the embedded world, in UnlearnCanvas's protocol (Zhang et al., 2024): every object in every style.

One style or several are erased. UA measures whether they are gone, IRA whether the other styles are still generated,
CRA whether the objects are.
"""

from collections.abc import Sequence

from unlearning.concepts import ERASE, RETAIN, Concept, Prompt, UnlearningTask, concept_names
from unlearning.config.values import Count, Natural, StyledTemplate
from unlearning.data.captioning import with_article
from unlearning.data.objects import TrainingImages, known, reference_images
from unlearning.data.openmoji import CIFAR10, OBJECTS, STYLES


def styles(
    concept: str | Sequence[str],
    *,
    objects: Sequence[str] = CIFAR10,
    template: StyledTemplate = "a {object} image in {style} style",
    images_per_prompt: Count = 2,
    pictures: Natural = 64,
) -> UnlearningTask:
    """Erases one or several styles. The evaluation prompts each of `objects` in each of the styles.

    Args:
        concept: One style or several.
        objects: The objects to prompt.
        template: The prompt for an `{object}` in a `{style}`.
        images_per_prompt: Images generated for each prompt.
        pictures: Forget images, in the erased styles at random, and as many retain images in the others.

    Raises:
        UserError: For a name that is not one of the styles.
    """
    erased = [known(name, list(STYLES), "style") for name in concept_names(concept)]
    others = [style for style in STYLES if style not in erased]

    def named(style: str) -> str:
        return f"{style} style"

    def prompt(thing: str, style: str) -> Prompt:
        text = with_article(template.format(object=thing, style=style))
        role, of = (ERASE, named(style)) if style in erased else (RETAIN, "")
        return Prompt(text, role, {"style": style, "object": thing}, concept=of)

    shown = [name for name in OBJECTS if name not in CIFAR10]
    anchor = named(others[0]) if others else ""
    references = {ERASE: reference_images(objects, erased)}
    if others:
        references[RETAIN] = reference_images(objects, others[:1])
    retained = TrainingImages(shown, shown, others, pictures, seed=1) if others else None
    return UnlearningTask(
        erase=tuple(Concept(named(style), anchor=anchor) for style in erased),
        retain=tuple(Concept(named(style)) for style in others),
        template="an image in {}",
        kind="style",
        prompts=tuple(prompt(thing, style) for style in STYLES for thing in objects),
        images_per_prompt=images_per_prompt,
        forget_images=TrainingImages(shown, shown, erased, pictures, seed=0),
        retain_images=retained or (),
        retain_captions=retained.captions if retained else None,
        references=references,
    )

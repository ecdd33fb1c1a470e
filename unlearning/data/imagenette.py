"""Imagenette: ten classes of ImageNet, in ESD's protocol (Gandikota et al., 2023, section 5.3).

One class or several are erased; the evaluation prompts all ten. The judge is a ResNet-50 trained on ImageNet
(judge=imagenet), by its most probable class out of a thousand.
"""

from collections.abc import Sequence

from unlearning.concepts import ERASE, RETAIN, Concept, Prompt, UnlearningTask, concept_names
from unlearning.config.values import Count, Template
from unlearning.data.objects import known

CLASSES = (  # as ImageNet's labels spell them
    "tench",
    "English springer",
    "cassette player",
    "chain saw",
    "church",
    "French horn",
    "garbage truck",
    "gas pump",
    "golf ball",
    "parachute",
)


def imagenette(
    concept: str | Sequence[str], *, template: Template = "an image of a {}", images_per_prompt: Count = 500
) -> UnlearningTask:
    """Erases one or several of the classes. There are no synonyms, and no concepts to retain by name.

    Raises:
        UserError: For a name that is not one of the ten classes.
    """
    erased = [known(name, CLASSES, "class of Imagenette") for name in concept_names(concept)]

    def prompt(name: str) -> Prompt:
        role, of = (ERASE, name) if name in erased else (RETAIN, "")
        return Prompt(template.format(name), role, {"object": name}, concept=of)

    return UnlearningTask(
        erase=tuple(Concept(name) for name in erased),
        template=template,
        prompts=tuple(prompt(name) for name in CLASSES),
        images_per_prompt=images_per_prompt,
    )

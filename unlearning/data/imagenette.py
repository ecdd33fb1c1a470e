"""Imagenette's ten classes, in ESD's protocol (Gandikota et al., 2023, section 5.3): one is erased, all are drawn.

A ResNet-50 trained on ImageNet judges by its most probable class of the thousand (judge=imagenet).
"""

from unlearning.concepts import ERASE, RETAIN, Concept, Prompt, UnlearningTask
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


def imagenette(concept: str, *, template: str = "an image of a {}", images_per_prompt: int = 500) -> UnlearningTask:
    """Erases one of the classes; nothing is retained by name, nor asked for by another word."""
    known(concept, CLASSES, "class of Imagenette")
    return UnlearningTask(
        erase=(Concept(concept),),
        template=template,
        prompts=tuple(
            Prompt(template.format(name), ERASE if name == concept else RETAIN, {"object": name}) for name in CLASSES
        ),
        images_per_prompt=images_per_prompt,
    )

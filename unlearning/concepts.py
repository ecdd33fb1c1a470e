"""The unlearning task: what to erase, what to generate in its place, what to retain, and how this is evaluated."""

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from unlearning.config.quoting import typed, unprintable
from unlearning.errors import UserError

log = logging.getLogger(__name__)

# The role of a prompt or of an image in the evaluation. Roles are open: an evaluator accepts any other text.
ERASE, SYNONYM, RETAIN = ROLES = ("erase", "synonym", "retain")
ATTACK = "attack"  # an erased concept, prompted by an attack

References = Callable[[int], Sequence[np.ndarray]]  # a count n -> n real images (uint8)
Kind = Literal["object", "style"]  # of an erased concept


@dataclass(frozen=True)
class Concept:
    """A concept by name.

    Attributes:
        name: The word or words that stand for it in a prompt.
        synonyms: Other words for it.
        anchor: What to generate in its place; "" leaves this to the method.
    """

    name: str
    synonyms: tuple[str, ...] = ()
    anchor: str = ""

    @property
    def words(self) -> tuple[str, ...]:
        """The name and the synonyms."""
        return (self.name, *self.synonyms)

    @property
    def style(self) -> str:
        """The name without "style" at its end, for templates that say it: "in the style of {}"."""
        return self.name.removesuffix(" style")


@dataclass(frozen=True)
class Prompt:
    """One prompt of the evaluation.

    Attributes:
        text: The prompt.
        role: ERASE, SYNONYM, RETAIN, ATTACK, or any other text.
        labels: The right answers by question ("object", "style") for a classifier that sees a faithful image of the
            prompt. The first question is the one that the erasure is about.
        seed: The seed of the prompt's first image; None derives it from the run's seed.
        guidance_scale: The prompt's own guidance scale; None is the sampler's.
        concept: The name of the erased concept that the prompt belongs to; "" if it belongs to none.
        height, width: Of the prompt's own images, in pixels; None is the model's.
    """

    text: str
    role: str
    labels: dict[str, str] = field(default_factory=dict)
    seed: int | None = None
    guidance_scale: float | None = None
    concept: str = ""
    height: int | None = None
    width: int | None = None


Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Region:
    """A part of an image, with a role and labels as a prompt has them."""

    box: Box
    role: str
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Input:
    """An input image of an image-to-image model.

    Attributes:
        name: The image's name; its output is saved under it.
        role: As a prompt's.
        read: Returns the image, (H, W, 3) uint8.
        regions: What is known to be in the image; may be empty.
        concept: The name of the erased concept that the image shows; "" if it shows none.
    """

    name: str
    role: str
    read: Callable[[], np.ndarray] = field(repr=False)
    regions: tuple[Region, ...] = ()
    concept: str = ""


@dataclass(frozen=True)
class UnlearningTask:
    """All that a method may know, and all that the evaluation measures. Frozen.

    Attributes:
        erase: The concepts to erase, at least one.
        retain: Concepts that a method may use to retain the rest. The evaluation also covers others.
        template: How a concept's name becomes a prompt.
        prompts: The prompts of the evaluation. Methods must not use them.
        images_per_prompt: Images generated for each prompt.
        inputs: The evaluation's input images, for an image-to-image model. They replace `prompts`.
        forget_images: Images of the erased concepts for methods that learn from images, (H, W, 3) uint8; may be empty.
        retain_images: Images of other things, as above; may be empty.
        retain_captions: Returns a caption for each of the retain images; None if unknown.
        forget_boxes: Returns, for each of the forget images, the boxes of the erased concepts in it; None if unknown.
        references: For a role, a function of a count n. It returns n real images (uint8) of what the prompts of this
            role ask for, or fewer if there are fewer: the reference set of an FID.
        skipped: One message for each image or row of the user's data that could not be used.
        kind: What the erased concepts are, for methods whose prompts depend on it.

    Raises:
        UserError: If there is nothing to erase.
    """

    erase: tuple[Concept, ...]
    retain: tuple[Concept, ...] = ()
    template: str = "a photo of the {}"
    prompts: tuple[Prompt, ...] = ()
    images_per_prompt: int = 1
    inputs: Sequence[Input] = ()
    forget_images: Sequence[np.ndarray] = ()
    retain_images: Sequence[np.ndarray] = ()
    retain_captions: Callable[[], Sequence[str]] | None = None
    forget_boxes: Callable[[], Sequence[Sequence[Box]]] | None = None
    references: dict[str, References] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()
    kind: Kind = "object"

    def __post_init__(self) -> None:
        if not self.erase:
            raise UserError(NOTHING_TO_ERASE)

    @property
    def name(self) -> str:
        """The names of the erased concepts, joined by "+"."""
        return "+".join(concept.name for concept in self.erase)

    def prompt(self, word: str) -> str:
        """The template filled with `word`. The empty word gives the empty prompt."""
        return self.template.format(word) if word else ""


NOTHING_TO_ERASE = (
    "Nothing to erase: give a concept (concept=cat), several (concept=[cat,dog]), or images (forget=...)."
)


def concept_names(concept: str | Sequence[str] | None) -> tuple[str, ...]:
    """The names in the setting `concept`, which is one name or a list of names. Each name occurs once.

    Raises:
        UserError: If there is no name, or one of them cannot be a name.
    """
    given = list(concept) if isinstance(concept, Sequence) and not isinstance(concept, str) else [concept]
    if not given or any(name is None or not str(name).strip() for name in given):
        raise UserError(NOTHING_TO_ERASE)
    names = tuple(dict.fromkeys(as_name(name) for name in given))
    for name in names:
        if "," in name:
            several = typed("concept", [part.strip() for part in name.split(",") if part.strip()])
            log.warning("%r is one concept. For several, type %s", name, several)
    return names


def as_name(name: object) -> str:
    """The name of a concept as text.

    Raises:
        UserError: If YAML has made a truth value or a decimal number of it, it is blank, it holds characters that no
            text has, or it is a path.
    """
    if isinstance(name, bool | float):  # what was written is lost: 3.10 is 3.1, and yes is True
        raise UserError(f"A concept is called {name!r}, which YAML does not read as text: put it in quotes.")
    text = "" if name is None else str(name)
    if not text.strip():
        raise UserError(f"A concept is called {text!r}, which is no name: give it a word, or leave it out.")
    if bad := unprintable(text):
        raise UserError(f"The concept {text!r} holds the character {bad!a}, which no prompt can have.")
    if re.match(r"~?/|\.+(/|$)", text.strip()):
        raise UserError(f"The concept {text!r} is a path. A folder of images is dataset=folder {typed('forget', text)}")
    return text

"""What is erased, what is drawn in its place, what must survive, and the prompts that show whether it did."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from unlearning.errors import UserError

# What a prompt is there to show: that the concept is gone, under other words too, and that the rest is not.
ERASE, SYNONYM, RETAIN = ROLES = ("erase", "synonym", "retain")
ATTACK = "attack"  # the role of images with which an attack tries to bring a concept back


@dataclass(frozen=True)
class Concept:
    """A thing with a name, other words for it, and what to draw in its place ("" for anything)."""

    name: str
    synonyms: tuple[str, ...] = ()
    anchor: str = ""


@dataclass(frozen=True)
class Prompt:
    """One line of an evaluation: the text, what it is there to show, and what a faithful picture of it would show.

    `labels` maps a question that a classifier can answer ("object", "style") to the right answer. A list of prompts may
    bring a seed and a guidance scale for each; by default the run and the sampler have them.
    """

    text: str
    role: str
    labels: dict[str, str] = field(default_factory=dict)
    seed: int | None = None
    guidance_scale: float | None = None


Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels


@dataclass(frozen=True)
class Region:
    """A part of a picture, what it shows, and why it is looked at; `labels` as a prompt's."""

    box: Box
    role: str
    labels: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Input:
    """A picture for an image-to-image model to put out again: (H, W, 3) uint8 by `read`, what is in it, if known."""

    name: str
    role: str
    read: Callable[[], np.ndarray] = field(repr=False)
    regions: tuple[Region, ...] = ()


@dataclass(frozen=True)
class UnlearningTask:
    """Frozen: everything a method may know, and everything an evaluation asks.

    Args:
        erase: The concepts to forget.
        retain: Concepts a method may use to hold on to the rest. The evaluation asks about others too.
        template: How a concept's name becomes a prompt.
        prompts: The evaluation's prompts. No method may look at these.
        images_per_prompt: Pictures drawn of each prompt.
        inputs: What an evaluation of an image-to-image model starts from, in place of prompts.
        forget_images, retain_images: Pictures (H, W, 3) uint8 that a method may learn from; may be empty.
        forget_boxes: Where in each of the forget images the concept is, where that is known.
        references: For a role, a function of a count that gives so many real pictures (uint8) of what the prompts of
            that role ask for: the reference set of an FID.
        skipped: What of the user's data could not be used, a message each.
    """

    erase: tuple[Concept, ...]
    retain: tuple[Concept, ...] = ()
    template: str = "a photo of the {}"
    prompts: tuple[Prompt, ...] = ()
    images_per_prompt: int = 1
    inputs: Sequence[Input] = ()
    forget_images: Sequence[np.ndarray] = ()
    retain_images: Sequence[np.ndarray] = ()
    forget_boxes: Callable[[], Sequence[Sequence[Box]]] | None = None
    references: dict[str, Callable[[int], Sequence[np.ndarray]]] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.erase:
            raise UserError("Nothing to erase: name a concept (concept=cat) or give a folder of images (forget=...).")

    @property
    def name(self) -> str:
        return "+".join(concept.name for concept in self.erase)

    def prompt(self, word: str) -> str:
        """The template about `word`; the empty word is the empty prompt."""
        return self.template.format(word) if word else ""

"""The student's conditioning. Without labels, the name of the concept is unknown.

- null: the null prompt; the write-up's. The path from text to the concept stays open.
- words: the words of a vocabulary that describe the forget images (scrubbing/words.py).
- caption: the task's own name for the concept, as a comparison: this uses a label.
"""

# N images, C H W latent shape.
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from unlearning.concepts import UnlearningTask
from unlearning.errors import unknown
from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel
from unlearning.scrubbing.words import PER_CALL, in_all_templates, spread, words_of

ConditioningKind = Literal["null", "words", "caption"]
RETAIN_WORDS = 64  # words in the prompts of the retain images


@dataclass(frozen=True)
class ConditioningRows:
    """Rows of conditioning to choose from at random.

    Attributes:
        null: One row: the null prompt.
        forget, retain: The student's rows for forget and for retain images.
        words: Words that describe the forget images: those of the search, or the task's own names.
        others: Other words.
    """

    null: Conditioning
    forget: Conditioning
    retain: Conditioning
    words: tuple[str, ...] = ()
    others: tuple[str, ...] = ()


def conditioning_rows(
    kind: ConditioningKind | None,
    teacher: DiffusionModel,
    task: UnlearningTask,
    forget: Tensor,
    retain: Tensor,
    M: Tensor,
    words: Sequence[str] | None = None,
    clip: str | None = None,
) -> ConditioningRows:
    """The rows for a kind of conditioning.

    Args:
        forget, retain: Latents of the images, (N, C, H, W).
        M: Masks of the concept in the forget images, (N, 1, H, W).
        words, clip: Candidates for "words", and the CLIP that chooses them (see `words_of`); by default all words.

    Raises:
        UserError: For an unknown kind, or if no word helps the teacher to denoise the forget images.
    """
    null = teacher.encode_prompts([""])

    def with_null(prompts: Sequence[str]) -> Conditioning:
        parts = [prompts[i : i + PER_CALL] for i in range(0, len(prompts), PER_CALL)]
        return Conditioning.cat([null, *map(teacher.encode_prompts, parts)])

    match kind:
        case "null" | None:  # YAML reads null as None
            return ConditioningRows(null, null, null)
        case "caption":
            names = [word for concept in task.erase for word in (concept.name, *concept.synonyms)]
            others = [concept.name for concept in task.retain]
            erased, retained = with_null(in_all_templates(names)), with_null(in_all_templates(others))
            return ConditioningRows(null, erased, retained, tuple(names), tuple(others))
        case "words":
            chosen, others = words_of(task, teacher, forget, retain, M, words, clip)
            some = in_all_templates(spread(others, RETAIN_WORDS))
            return ConditioningRows(
                null, with_null(in_all_templates(chosen)), with_null(some), tuple(chosen), tuple(others)
            )
    raise unknown("conditioning", kind, get_args(ConditioningKind))

"""The student's conditioning. Without labels, the name of the concept is unknown.

- null: the null prompt; the write-up's. The path from text to the concept stays open.
- words: the words of a vocabulary that describe the forget images (scrubbing/words.py).
- inverted: embeddings that are trained until the teacher denoises the forget images best (Gal et al., 2023,
  https://arxiv.org/abs/2208.01618, eq. 2; here the text encoder's output and the pooled text are trained).
- caption: the task's own name for the concept, as a comparison: this uses a label.
"""

# B batch, N images, L tokens, D text width.
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from unlearning.concepts import UnlearningTask
from unlearning.errors import UserError, unknown
from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel
from unlearning.sampling.denoising import noised
from unlearning.sampling.inversion import invert
from unlearning.scrubbing.words import PER_CALL, in_all_templates, spread, words_of

ConditioningKind = Literal["null", "words", "inverted", "caption"]
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
    batch: int = 8,
) -> ConditioningRows:
    """The rows for a kind of conditioning.

    Args:
        forget, retain: Latents of the images, (N, C, H, W).
        M: Masks of the concept in the forget images, (N, 1, H, W).
        words, clip: Candidates for "words", and the CLIP that chooses them (see `words_of`); by default all words.
        batch: Images in a step of "inverted".

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
        case "inverted":
            return ConditioningRows(null, inverted(teacher, forget, M, batch=batch), null)
    raise unknown("conditioning", kind, get_args(ConditioningKind))


def inverted(
    teacher: DiffusionModel,
    latents: Tensor,
    M: Tensor,
    rows: int = 4,
    steps: int = 150,
    batch: int = 8,
    lr: float = 0.02,
) -> Conditioning:
    """`rows` embeddings, trained for the teacher to denoise the masked part of latents, and the null prompt's row.

    Raises:
        UserError: For a model that is conditioned on a class: there is nothing between two classes.
    """
    null = teacher.encode_prompts([""])
    if not null.embeds.is_floating_point():
        raise UserError(f"{teacher.name} is conditioned on classes, which cannot be inverted: conditioning=words.")
    start, dtype = null.expand(rows), null.embeds.dtype
    embeds = nn.Parameter(start.embeds.float())  # half precision rounds small steps away
    embeds.data += 0.01 * torch.randn_like(embeds)
    extra = {k: nn.Parameter(v.float()) for k, v in start.extra.items() if k == "pooled"}

    def current() -> Conditioning:
        return Conditioning(embeds.to(dtype), {**start.extra, **{k: v.to(dtype) for k, v in extra.items()}})

    def loss() -> Tensor:
        own = torch.randint(rows, (batch,), device=embeds.device)
        some = torch.randint(len(latents), (batch,), device=latents.device)
        z_0, mask = latents[some], M[some]
        z_t, t = noised(teacher, z_0)
        error = (teacher.to_x0(teacher.predict(z_t, t, current()[own]), z_t, t) - z_0).square()
        return (teacher.snr(t).clamp(max=1) * mask * error).mean() / mask.mean()

    invert(teacher, [embeds, *extra.values()], loss, optimizer=partial(torch.optim.Adam, lr=lr), iterations=steps)
    with torch.no_grad():
        return Conditioning.cat([null, current()])

"""The student's conditioning. Without labels, the name of the concept is unknown.

- null: the null prompt; the write-up's. The path from text to the concept stays open.
- words: the words of a vocabulary with which the teacher denoises the forget images best: a diffusion classifier (Li et
  al., 2023, https://arxiv.org/abs/2303.16203, eq. 5) with every word as a class.
- inverted: embeddings that are trained until the teacher denoises the forget images best (Gal et al., 2023,
  https://arxiv.org/abs/2208.01618, eq. 2; here the text encoder's output and the pooled text are trained).
- caption: the task's own name for the concept, as a comparison: this uses a label.
"""

# B batch, N images, L tokens, D text width, W words, S samples.
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from unlearning.concepts import UnlearningTask
from unlearning.errors import UserError, unknown
from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel, at_once
from unlearning.sampling.denoising import noised
from unlearning.sampling.inversion import invert

log = logging.getLogger(__name__)
ConditioningKind = Literal["null", "words", "inverted", "caption"]
TEMPLATES = ("{}", "a {}", "the {}", "a photo of the {}", "a picture of a {}")
PER_CALL = 32  # images in one call of the teacher
FINALISTS, FINAL_SAMPLES = 16, 256  # words in the last round of the search, and samples for each of them
POOLED = ("pooled", "text_embeds")  # the families' names for the pooled text in Conditioning.extra
SUITED = 0.8  # quantile of a word's evidence on the retain samples
RETAIN_WORDS = 64  # words in the prompts of the retain images
MIN_ERRORS = 2  # least difference between the best word and the best rejected one, in standard errors
DECISIVE = (0.5, 0.9)  # share of the schedule where the prompt matters: below, x_t shows the image; above, only noise


@dataclass(frozen=True)
class ConditioningRows:
    """Rows of conditioning to choose from at random.

    Attributes:
        null: One row: the null prompt.
        forget, retain: The student's rows for forget and for retain images.
        words: The words that describe the forget images, for conditioning=words.
    """

    null: Conditioning
    forget: Conditioning
    retain: Conditioning
    words: tuple[str, ...] = ()


def conditioning_rows(
    kind: ConditioningKind | None,
    teacher: DiffusionModel,
    task: UnlearningTask,
    forget: Tensor,
    retain: Tensor,
    M: Tensor,
    words: Sequence[str] | None = None,
    batch: int = 8,
) -> ConditioningRows:
    """The rows for a kind of conditioning.

    Args:
        forget, retain: Latents of the images, (N, C, H, W).
        M: Masks of the concept in the forget images, (N, 1, H, W).
        words: Candidates for "words"; random words of the tokenizer's vocabulary are added up to eighty. By default the
            whole vocabulary.
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
            return ConditioningRows(null, with_null(_prompts(names)), with_null(_prompts(others)))
        case "words":
            chosen, others = find_words(teacher, forget, retain, M, candidates(words, teacher.vocabulary()))
            some = spread(others, RETAIN_WORDS)
            return ConditioningRows(null, with_null(_prompts(chosen)), with_null(_prompts(some)), tuple(chosen))
        case "inverted":
            return ConditioningRows(null, inverted(teacher, forget, M, batch=batch), null)
    raise unknown("conditioning", kind, get_args(ConditioningKind))


def _prompts(words: Sequence[str]) -> list[str]:
    return [template.format(word) for word in words for template in TEMPLATES]


def spread(words: Sequence[str], count: int) -> list[str]:
    """At most `count` of the words, evenly spaced from the first to the last."""
    places = np.linspace(0, len(words) - 1, min(count, len(words))).round().astype(int)
    return [words[i] for i in places]


def candidates(given: Sequence[str] | None, vocabulary: Sequence[str]) -> list[str]:
    """The given words and random words of the vocabulary, for the retain images' prompts; by default all words."""
    if not given:
        return list(vocabulary)
    known = set(given)
    rest = [word for word in vocabulary if word not in known]
    more = torch.randperm(len(rest))[: max(0, FINALISTS + RETAIN_WORDS - len(given))]
    return [*given, *(rest[i] for i in more)]


@torch.no_grad()
def find_words(
    teacher: DiffusionModel, forget: Tensor, retain: Tensor, M: Tensor, words: list[str], samples: int = 16
) -> tuple[list[str], list[str]]:
    """The words that describe the forget images, best first, and those that do not, the best of them last.

    The search uses the half of the images with the largest masks, because a word fits an image of one object best. For
    a style, it can happen that no word denoises these images better than the null prompt. The search then subtracts
    from each word's evidence its evidence on the retain images that it fits best, if that is negative.

    Raises:
        UserError: If there are no words, or no word has positive evidence.
    """
    if not words:
        raise UserError("The tokenizer knows no whole words. Give candidates: method.words=[...].")
    largest = forget[M.mean((1, 2, 3)).argsort(descending=True)[: -(-len(M) // 2)]]

    def gain(words: list[str], samples: int) -> Tensor:
        return log_error_ratio(teacher, largest, words, samples)

    def gain_without_loss(words: list[str], samples: int) -> Tensor:
        on_retain = log_error_ratio(teacher, retain, words, samples)
        return gain(words, samples) - on_retain.quantile(SUITED, dim=1, keepdim=True).clamp(max=0)

    for evidence in (gain, gain_without_loss):
        if chosen := _search(evidence, words, samples):
            return chosen
    raise UserError(
        "No word of the vocabulary helps the teacher to denoise the forget images. Give other candidates "
        "(method.words=[...]), or use the concept's name (method.conditioning=caption) or an embedding "
        "(method.conditioning=inverted)."
    )


def _search(
    evidence: Callable[[list[str], int], Tensor], words: list[str], samples: int
) -> tuple[list[str], list[str]] | None:
    """The words with at least half of the best word's mean evidence, and others; None if no evidence is positive.

    `evidence` gives (W, S). It is computed for all words on the same few samples, then for the best quarter on twice as
    many, and so on (successive halving). The last FINALISTS words are compared on FINAL_SAMPLES.
    """
    mean: dict[str, float] = {}
    left = words
    while True:
        measured = evidence(left, samples if len(left) > FINALISTS else FINAL_SAMPLES)
        mean |= dict(zip(left, measured.mean(1).tolist(), strict=True))
        ranked = sorted(left, key=lambda word: -mean[word])
        if len(left) <= FINALISTS:
            break
        left, samples = ranked[: max(FINALISTS, len(left) // 4)], 2 * samples
    best = mean[ranked[0]]
    if best <= 0:
        return None
    chosen = [word for word in ranked if mean[word] >= best / 2]
    if rivals := ranked[len(chosen) :]:
        _warn_if_close(ranked[0], rivals[0], dict(zip(left, measured, strict=True)))
    return chosen, sorted((word for word in words if word not in ranked), key=lambda word: mean[word])


def _warn_if_close(best: str, rival: str, evidence: dict[str, Tensor]) -> None:
    """Warns if the best word is hardly better than the best rejected word, on the samples of the last round."""
    difference = evidence[best] - evidence[rival]
    error = difference.std() / len(difference) ** 0.5
    if difference.mean() < MIN_ERRORS * error:
        log.warning(
            "%s describes the forget images hardly better than %s, which was rejected (by %.3f ± %.3f). If the images "
            "do not show it, give candidates (method.words=[...]) or another seed.",
            *(best, rival, difference.mean(), error),
        )


def log_error_ratio(teacher: DiffusionModel, latents: Tensor, words: Sequence[str], samples: int) -> Tensor:
    """log(error with the null prompt / error with the word), (W, S): errors of x_0, on the same samples for all words.

    A sample is an image, a timestep and a noise. The logarithm is the log-likelihood ratio of Gaussians of unknown
    variance, so that samples with small errors (at small t, or of an image without detail) have the same weight as all
    others. Without latents the result is 0.
    """
    if not len(latents):
        return torch.zeros(len(words), samples)
    rows, (low, high) = torch.randint(len(latents), (samples,)), DECISIVE
    t = teacher.timesteps(low + (high - low) * (torch.arange(samples) + torch.rand(samples)) / samples)
    z_0 = latents[rows]
    x_t, prompts = teacher.add_noise(z_0, torch.randn_like(z_0), t), ["", *words]
    jobs = [(p, i) for p in range(len(prompts)) for i in range(samples)]
    errors = []
    few = at_once(latents, PER_CALL)
    for part in tqdm([jobs[i : i + few] for i in range(0, len(jobs), few)], "searching words", leave=False):
        texts, i = zip(*part, strict=True)
        x, s, z = (values[list(i)] for values in (x_t, t, z_0))
        distinct = list(dict.fromkeys(texts))
        c = teacher.encode_prompts([prompts[p] for p in distinct])[[distinct.index(p) for p in texts]]
        errors.append((teacher.to_x0(teacher.predict(x, s, c), x, s) - z).square().mean((1, 2, 3)))
    log_error = torch.cat(errors).reshape(len(prompts), samples).clamp(min=1e-12).log().cpu()
    return log_error[0] - log_error[1:]


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
    extra = {k: nn.Parameter(v.float()) for k, v in start.extra.items() if k in POOLED}

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

"""Words that describe a folder of images, without labels.

They are the words of a vocabulary with which the teacher denoises the forget images best: a diffusion classifier (Li et
al., 2023, https://arxiv.org/abs/2303.16203, eq. 5) with every word as a class. For a large vocabulary, a CLIP chooses
the candidates. This takes one call of CLIP for each word and image, and no call of the denoiser (Radford et al., 2021,
https://arxiv.org/abs/2103.00020, zero-shot classification).
"""

# N images, W words, S samples, D width of CLIP's common space.
import logging
from collections.abc import Callable, Sequence
from itertools import cycle
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from unlearning.concepts import UnlearningTask
from unlearning.errors import UserError
from unlearning.judges.clip import load_clip
from unlearning.models.diffusion import DiffusionModel, at_once
from unlearning.store.loops import resumed

log = logging.getLogger(__name__)
Device = str | torch.device
TEMPLATES = ("{}", "a {}", "the {}", "a photo of the {}", "a picture of a {}")
PER_CALL = 32  # images, or texts, in one call of a network
SHORTLIST = 100  # words that a CLIP chooses
FINALISTS, FINAL_SAMPLES = 16, 256  # words in the last round of the search, and samples for each of them
SUITED = 0.8  # quantile of a word's evidence on the retain samples
MIN_ERRORS = 2  # minimum difference between the best word and the best rejected one, in standard errors
DECISIVE = (0.5, 0.9)  # share of the schedule where the prompt matters: below, x_t shows the image; above, only noise


def words_of(
    task: UnlearningTask,
    teacher: DiffusionModel,
    forget: Tensor,
    retain: Tensor,
    M: Tensor,
    words: Sequence[str] | None = None,
    clip: str | None = None,
) -> tuple[list[str], list[str]]:
    """The words that describe the task's forget images, best first, and other words of the vocabulary.

    The other words are those that were not candidates, followed by the rejected candidates, the best of them last. They
    may therefore include a word for the concept that was not a candidate.

    Args:
        forget, retain: Latents of the task's images, (N, C, H, W).
        M: Masks of the concept in the forget images, (N, 1, H, W).
        words: The candidates; None for those that the CLIP chooses.
        clip: A CLIP's name on the Hugging Face Hub, or its folder; None for all words as candidates. Without effect
            where `words` are given.

    Raises:
        UserError: If no word helps the teacher to denoise the forget images, or there is no such CLIP.
    """
    vocabulary = candidates = teacher.vocabulary()
    if words:
        candidates = list(words)
    elif clip and vocabulary:
        candidates = shortlist(clip, task.forget_images, vocabulary, device=teacher.device)
    chosen, rejected = find_words(teacher, forget, retain, M, candidates)
    known = {word.casefold() for word in candidates}
    return chosen, [*(word for word in vocabulary if word.casefold() not in known), *rejected]


def shortlist(
    clip: str, images: Sequence[np.ndarray], words: Sequence[str], count: int = SHORTLIST, device: Device = "cpu"
) -> list[str]:
    """The words that a CLIP finds most similar to the images, in the order of `words`.

    Args:
        images: (H, W, 3) uint8.

    Raises:
        UserError: If there is no CLIP at `clip`.
    """
    best = similarities(clip, images, words, device).topk(min(count, len(words))).indices
    return [words[i] for i in sorted(best.tolist())]


@torch.no_grad()
def similarities(clip: str, images: Sequence[np.ndarray], words: Sequence[str], device: Device = "cpu") -> Tensor:
    """The similarity of each word to the images, (W,): the mean cosine between them and "a photo of a WORD"."""
    model, processor, _ = load_clip(clip, "method.clip")
    model.to(device)

    def image_features(some: list[np.ndarray]) -> Tensor:
        return model.get_image_features(**processor(images=some, return_tensors="pt").to(device))

    def text_features(some: list[str]) -> Tensor:
        prompts = [f"a photo of a {word}" for word in some]
        own = processor(text=prompts, padding=True, truncation=True, return_tensors="pt").to(device)
        return model.get_text_features(**own)

    shown = torch.cat([normalize(image_features(some), dim=-1) for some in _parts(images)]).mean(0)  # (D,)
    return torch.cat([normalize(text_features(some), dim=-1) @ shown for some in _parts(words)]).cpu()


def _parts(values: Sequence) -> list:
    """The values, PER_CALL at a time."""
    return [list(values[i : i + PER_CALL]) for i in range(0, len(values), PER_CALL)]


def in_all_templates(words: Sequence[str]) -> list[str]:
    """Prompts: each word in every template."""
    return [template.format(word) for word in words for template in TEMPLATES]


def in_turn(words: Sequence[str], count: int) -> list[str]:
    """Prompts: at most `count` of the words, evenly spaced, each in one of the templates in turn."""
    return [template.format(word) for word, template in zip(spread(words, count), cycle(TEMPLATES))]


def spread(words: Sequence[str], count: int) -> list[str]:
    """At most `count` of the words, evenly spaced from the first to the last."""
    places = np.linspace(0, len(words) - 1, min(count, len(words))).round().astype(int)
    return [words[i] for i in places]


@torch.no_grad()
def find_words(
    teacher: DiffusionModel, forget: Tensor, retain: Tensor, M: Tensor, words: list[str], samples: int = 16
) -> tuple[list[str], list[str]]:
    """The words that describe the forget images, best first, and the other words, the best of them last.

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
        "(method.words=[...]), or use the concept's name (method.conditioning=caption)."
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
    done, few = SimpleNamespace(errors=torch.zeros(len(jobs))), at_once(latents, PER_CALL)
    for first in resumed(range(0, len(jobs), few), "searching words", done):
        part = jobs[first : first + few]
        texts, i = zip(*part, strict=True)
        x, s, z = (values[list(i)] for values in (x_t, t, z_0))
        distinct = list(dict.fromkeys(texts))
        c = teacher.encode_prompts([prompts[p] for p in distinct])[[distinct.index(p) for p in texts]]
        error = (teacher.to_x0(teacher.predict(x, s, c), x, s) - z).square().mean((1, 2, 3))
        done.errors[first : first + few] = error.cpu()
    log_error = done.errors.reshape(len(prompts), samples).clamp(min=1e-12).log()
    return log_error[0] - log_error[1:]

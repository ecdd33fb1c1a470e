"""What the student is told while it forgets: without labels, nobody knows what a prompt would call the concept.

- null: nothing; the write-up's. The road from text to the concept stays open.
- generic: prompts that name nothing.
- words: the words of a vocabulary under which the teacher denoises the forget images best: a diffusion classifier (Li
  et al., 2023, https://arxiv.org/abs/2303.16203, eq. 5) with every word for a class.
- inverted: an embedding, trained until the teacher denoises the forget images best (Gal et al., 2023,
  https://arxiv.org/abs/2208.01618, eq. 2; here of the text encoder's output, and for the family's pooled text too).
- caption: the task's own name of the concept, for comparison: a label.
"""

# B batch, N pictures, L tokens, D text width, W words.
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from unlearning.concepts import UnlearningTask
from unlearning.errors import UserError
from unlearning.models.diffusion import Conditioning, DiffusionModel, at_once

log = logging.getLogger(__name__)
Telling = Literal["null", "generic", "words", "inverted", "caption"]
GENERIC = ("a photo", "an image", "a picture", "a drawing", "a painting", "a photo of something")
TEMPLATES = ("{}", "a {}", "the {}", "a photo of the {}", "a picture of a {}")
AT_ONCE, MOST = 32, 16  # pictures in a call of the teacher; words that stand for the concept
LAST_LOOKS = 256  # noised pictures on which those are tried at last
POOLED = ("pooled", "text_embeds")  # what families call the pooled text in Conditioning.extra
SUITED = 0.8  # the quantile of retain pictures from which on a word suits them
RETAINED = 64  # other words, whose prompts hold the rest in place
STANDS_OUT = 2  # standard errors of the difference
DECISIVE = (0.5, 0.9)  # of the schedule: below, the picture tells the teacher more than a word can; above, neither does


@dataclass(frozen=True)
class Told:
    """The null prompt, and rows to choose from, for the forget images and for the retain images; and words found."""

    null: Conditioning
    forget: Conditioning
    retain: Conditioning
    words: tuple[str, ...] = ()


def told(
    kind: Telling | None,
    teacher: DiffusionModel,
    task: UnlearningTask,
    forget: Tensor,
    retain: Tensor,
    M: Tensor,
    words: Sequence[str] | None = None,
    batch: int = 8,
) -> Told:
    """
    Args:
        forget, retain: Latents of the images, (N, C, H, W).
        M: Where in the forget images the concept is, (N, 1, H, W).
        words: Candidates, made up to eighty from the tokenizer's vocabulary by chance; by default all of that.
        batch: Pictures in a step of an inversion.

    Raises:
        UserError: For an unknown kind, or where no word tells the teacher anything about the forget images.
    """
    null = teacher.encode_prompts([""])

    def and_null(prompts: Sequence[str]) -> Conditioning:
        parts = [prompts[i : i + AT_ONCE] for i in range(0, len(prompts), AT_ONCE)]
        return Conditioning.cat([null, *map(teacher.encode_prompts, parts)])

    match kind:
        case "null" | None:  # as YAML reads it
            return Told(null, null, null)
        case "generic":
            return Told(null, and_null(GENERIC), null)
        case "caption":
            names = [word for concept in task.erase for word in (concept.name, *concept.synonyms)]
            return Told(null, and_null(_prompts(names)), and_null(_prompts([concept.name for concept in task.retain])))
        case "words":
            found, others = nearest_words(teacher, forget, retain, M, _to_try(words, teacher.vocabulary()))
            return Told(null, and_null(_prompts(found)), and_null(_prompts(others)), tuple(found))
        case "inverted":
            return Told(null, inverted(teacher, forget, M, batch=batch), null)
    raise UserError(f"There is no conditioning {kind!r}; there are {', '.join(get_args(Telling))}.")


def _prompts(words: Sequence[str]) -> list[str]:
    return [template.format(word) for word in words for template in TEMPLATES]


def _to_try(given: Sequence[str] | None, vocabulary: Sequence[str]) -> list[str]:
    """The words given, made up from the vocabulary, by chance: those not found are to hold the rest in place."""
    if not given:
        return list(vocabulary)
    known = set(given)
    rest = [word for word in vocabulary if word not in known]
    more = torch.randperm(len(rest))[: max(0, MOST + RETAINED - len(given))]
    return [*given, *(rest[i] for i in more)]


@torch.no_grad()
def nearest_words(
    teacher: DiffusionModel, forget: Tensor, retain: Tensor, M: Tensor, words: list[str], looks: int = 16
) -> tuple[list[str], list[str]]:
    """The words that stand for the forget pictures, best first, and words that do not, nearest last.

    The pictures looked at are those that show the concept largest: a word alone describes a picture of one thing. Where
    no word explains those better than the null prompt does, it is of a style, say, and nobody's caption: what a word
    costs even the retain pictures that it suits best is then not held against it.

    Raises UserError where that leaves none either.
    """
    if not words:
        raise UserError("The tokenizer knows no whole words: give some (method.words=[...]).")
    largest = forget[M.mean((1, 2, 3)).argsort(descending=True)[: -(-len(M) // 2)]]

    def gain(words: list[str], looks: int) -> Tensor:
        return explained(teacher, largest, words, looks)

    def forgiven(words: list[str], looks: int) -> Tensor:
        cost = explained(teacher, retain, words, looks).quantile(SUITED, dim=1, keepdim=True).clamp(max=0)
        return gain(words, looks) - cost

    for evidence in (gain, forgiven):
        if found := _standing_out(evidence, words, looks):
            return found
    raise UserError(
        "No word of the vocabulary helps the teacher to denoise the forget images. Give other words to try "
        "(method.words=[...]), or choose what needs none: the concept's own name (method.conditioning=caption) or an "
        "embedding (method.conditioning=inverted)."
    )


def _standing_out(
    evidence: Callable[[list[str], int], Tensor], words: list[str], looks: int
) -> tuple[list[str], list[str]] | None:
    """The words that have at least half of the best's evidence, a mean over looks (W, looks); and others. None without.

    Every word is tried in the same few looks; the better quarter goes on to twice as many, until sixteen are left,
    which are tried in many.
    """
    evident, left = {}, words
    while True:
        found = evidence(left, looks if len(left) > MOST else LAST_LOOKS)
        evident |= dict(zip(left, found.mean(1).tolist(), strict=True))
        ranked = sorted(left, key=lambda word: -evident[word])
        if len(left) <= MOST:
            break
        left, looks = ranked[: max(MOST, len(left) // 4)], 2 * looks
    best = evident[ranked[0]]
    if best <= 0:
        return None
    named = [word for word in ranked if evident[word] >= best / 2]
    if rivals := ranked[len(named) :]:
        _warn_of_chance(ranked[0], rivals[0], dict(zip(left, found, strict=True)))
    others = sorted((word for word in words if word not in ranked), key=lambda word: evident[word])
    spread = np.linspace(0, len(others) - 1, min(RETAINED, len(others))).round().astype(int)
    return named, [others[i] for i in spread]


def _warn_of_chance(best: str, rival: str, found: dict[str, Tensor]) -> None:
    """Of the last looks' evidence by word, of the best word and of the best that does not stand for the pictures."""
    more = found[best] - found[rival]
    error = more.std() / len(more) ** 0.5
    if more.mean() < STANDS_OUT * error:
        log.warning(
            "%s explains the forget images hardly better than %s does, which does not stand for them (by %.3f ± %.3f). "
            "If it is not what they show, give words of your own (method.words=[...]) or another seed.",
            *(best, rival, more.mean(), error),
        )


def explained(teacher: DiffusionModel, latents: Tensor, words: Sequence[str], looks: int) -> Tensor:
    """log(error of the null prompt / error of the word), (W, looks), in x_0, at the same noise for all words.

    Of a Gaussian whose variance nobody knows, the log likelihood is the error's log: a look at small t, or at a picture
    of which there is little to say, counts as any other. Of no pictures, none is better explained.
    """
    if not len(latents):
        return torch.zeros(len(words), looks)
    rows, (low, high) = torch.randint(len(latents), (looks,)), DECISIVE
    t = teacher.timesteps(low + (high - low) * (torch.arange(looks) + torch.rand(looks)) / looks)
    z_0 = latents[rows]
    x_t, prompts = teacher.add_noise(z_0, torch.randn_like(z_0), t), ["", *words]
    jobs = [(p, i) for p in range(len(prompts)) for i in range(looks)]
    errors = []
    few = at_once(latents, AT_ONCE)
    for part in tqdm([jobs[i : i + few] for i in range(0, len(jobs), few)], "naming", leave=False):
        asked, i = zip(*part, strict=True)
        x, s, z = (values[list(i)] for values in (x_t, t, z_0))
        names = list(dict.fromkeys(asked))
        c = teacher.encode_prompts([prompts[p] for p in names])[[names.index(p) for p in asked]]
        errors.append((teacher.to_x0(teacher.predict(x, s, c), x, s) - z).square().mean((1, 2, 3)))
    log_error = torch.cat(errors).reshape(len(prompts), looks).clamp(min=1e-12).log().cpu()
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
    """`rows` embeddings with which the teacher denoises best what M covers, and the null prompt's.

    Raises UserError for a model that is told a class and no text.
    """
    null = teacher.encode_prompts([""])
    if not null.embeds.is_floating_point():
        raise UserError(f"{teacher.name} is told a class, and between classes is nothing: conditioning=words.")
    start, dtype = null.expand(rows), null.embeds.dtype
    embeds = nn.Parameter(start.embeds.float())  # half precision would round small steps away
    embeds.data += 0.01 * torch.randn_like(embeds)
    extra = {k: nn.Parameter(v.float()) for k, v in start.extra.items() if k in POOLED}

    def found() -> Conditioning:
        return Conditioning(embeds.to(dtype), {**start.extra, **{k: v.to(dtype) for k, v in extra.items()}})

    optimizer = torch.optim.Adam([embeds, *extra.values()], lr=lr)
    with _layers_kept(teacher.denoiser):
        for _ in tqdm(range(steps), "inverting", leave=False):
            own = torch.randint(rows, (batch,), device=embeds.device)
            chosen = torch.randint(len(latents), (batch,), device=latents.device)
            z_0, where = latents[chosen], M[chosen]
            t = teacher.timesteps(torch.rand(batch))
            x_t = teacher.add_noise(z_0, torch.randn_like(z_0), t)
            with torch.enable_grad():
                error = (teacher.to_x0(teacher.predict(x_t, t, found()[own]), x_t, t) - z_0).square()
                loss = (teacher.snr(t).clamp(max=1) * where * error).mean() / where.mean()
                optimizer.zero_grad()
                loss.backward()
            optimizer.step()
    with torch.no_grad():
        return Conditioning.cat([null, found()])


@contextmanager
def _layers_kept(denoiser: nn.Module) -> Iterator[None]:
    """By the way back a teacher's weights have given way to the student's: its layers cannot be worked out again."""
    again = denoiser.is_gradient_checkpointing
    if again:
        denoiser.disable_gradient_checkpointing()
    try:
        yield
    finally:
        if again:
            denoiser.enable_gradient_checkpointing()

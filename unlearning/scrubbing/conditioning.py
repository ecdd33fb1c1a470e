"""What the student is told while it forgets: without labels, nobody knows what a prompt would call the concept.

- null: nothing; the write-up's. The road from text to the concept stays open.
- generic: prompts that name nothing.
- words: the words of a vocabulary under which the teacher denoises best what the masks cover: a diffusion classifier
  (Li et al., 2023, https://arxiv.org/abs/2303.16203, eq. 5) with every word for a class.
- inverted: an embedding, trained until the teacher denoises the forget images best (Gal et al., 2023,
  https://arxiv.org/abs/2208.01618, eq. 2; here of the text encoder's output, and for the family's pooled text too).
- caption: the task's own name of the concept, for comparison: a label.
"""

# B batch, N pictures, L tokens, D text width, W words.
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from tqdm import tqdm

from unlearning.concepts import UnlearningTask, UserError
from unlearning.models.base import Conditioning, DiffusionModel

log = logging.getLogger(__name__)
Telling = Literal["null", "generic", "words", "inverted", "caption"]
GENERIC = ("a photo", "an image", "a picture", "a drawing", "a painting", "a photo of something")
TEMPLATES = ("{}", "a {}", "the {}", "a photo of the {}", "a picture of a {}")
AT_ONCE, MOST = 32, 16  # pictures in a call of the teacher; words that stand for the concept
LAST_LOOKS = 256  # noised pictures on which those are tried at last
POOLED = ("pooled", "text_embeds")  # what families call the pooled text in Conditioning.extra
RETAINED = 64  # other words, whose prompts hold the rest in place
STANDS_OUT = 5 / 8  # of those: four standard deviations from what chance gives
DECISIVE = (0.5, 0.9)  # of the schedule: below, the picture tells the teacher more than a word can; above, neither does


@dataclass(frozen=True)
class Told:
    """Rows to choose from: for the forget images, and for the retain images. `words` are those found."""

    forget: Conditioning
    retain: Conditioning
    words: tuple[str, ...] = ()


def told(
    kind: Telling | None,
    teacher: DiffusionModel,
    task: UnlearningTask,
    latents: Tensor,
    M: Tensor,
    words: Sequence[str] | None = None,
) -> Told:
    """
    Args:
        latents, M: Of the forget images, (N, C, H, W), and where in them the concept is, (N, 1, H, W).
        words: The vocabulary; by default the tokenizer's whole words.

    Raises:
        UserError: For an unknown kind, or where no word tells the teacher anything about the forget images.
    """
    encode = teacher.encode_prompts
    match kind:
        case "null" | None:  # as YAML reads it
            return Told(encode([""]), encode([""]))
        case "generic":
            return Told(encode(["", *GENERIC]), encode([""]))
        case "caption":
            names = [word for concept in task.erase for word in (concept.name, *concept.synonyms)]
            others = [concept.name for concept in task.retain]
            return Told(encode(["", *_prompts(names)]), encode(["", *_prompts(others)]))
        case "words":
            found, others = nearest_words(teacher, latents, M, list(words or teacher.vocabulary()))
            return Told(encode(["", *_prompts(found)]), encode(["", *_prompts(others)]), tuple(found))
        case "inverted":
            return Told(inverted(teacher, latents, M), encode([""]))
    raise UserError(f"There is no conditioning {kind!r}; there are {', '.join(get_args(Telling))}.")


def _prompts(words: Sequence[str]) -> list[str]:
    return [template.format(word) for word in words for template in TEMPLATES]


@torch.no_grad()
def nearest_words(
    teacher: DiffusionModel, latents: Tensor, M: Tensor, words: list[str], looks: int = 8
) -> tuple[list[str], list[str]]:
    """The words that stand for the pictures, best first, and words that do not.

    Every word is tried on the same few noised pictures; the better quarter goes on to twice as many, until sixteen are
    left, which are tried on many: of a style the picture itself tells the teacher almost all that the word does. A word
    stands for the pictures if it lowers the teacher's error, in the median, by at least half as much as the best does.
    A warning says so where the best is hardly better than the best that does not.

    Raises UserError where none lowers it.
    """
    if not words:
        raise UserError("The tokenizer knows no whole words: give some (method.words=[...]).")
    tried, left = {}, words
    while True:
        error = errors(teacher, latents, M, ["", *left], looks if len(left) > MOST else LAST_LOOKS)
        gain = dict(zip(left, (error[0] - error[1:]).median(1).values.tolist(), strict=True))
        tried |= gain
        ranked = sorted(left, key=lambda word: -gain[word])
        if len(left) <= MOST:
            break
        left, looks = ranked[: max(MOST, len(left) // 4)], 2 * looks
    best = gain[ranked[0]]
    if best <= 0:
        raise UserError(
            "No word of the vocabulary helps the teacher to denoise the forget images. Give other words to try "
            "(method.words=[...]), or choose what needs none: the concept's own name (method.conditioning=caption) or "
            "an embedding (method.conditioning=inverted)."
        )
    found = [word for word in ranked if gain[word] >= best / 2]
    if rivals := ranked[len(found) :]:
        _warn_of_chance(ranked[0], rivals[0], dict(zip(left, error[1:], strict=True)))
    others = sorted(set(words) - set(ranked), key=lambda word: tried[word])
    return found, others[:: max(1, len(others) // RETAINED)][:RETAINED]


def _warn_of_chance(best: str, rival: str, error: dict[str, Tensor]) -> None:
    """Of the last looks' errors by word, of the best word found and of the best of the others."""
    share = (error[best] < error[rival]).float().mean().item()
    if share < STANDS_OUT:
        log.warning(
            "%s tells the teacher more about the forget images than %s does in only %.0f %% of looks. If it is not "
            "what they show, give words of your own (method.words=[...]) or another seed.",
            *(best, rival, 100 * share),
        )


def errors(teacher: DiffusionModel, latents: Tensor, M: Tensor, prompts: Sequence[str], looks: int) -> Tensor:
    """Squared errors (W, looks) of x_0 where M is, by prompt: capped in weight, at the same noise for all.

    The pictures are those that show the concept largest: a word alone describes a picture of one thing.
    """
    largest = M.mean((1, 2, 3)).argsort(descending=True)[: -(-len(M) // 2)]
    rows, (low, high) = largest[torch.randint(len(largest), (looks,))], DECISIVE
    t = teacher.timesteps(low + (high - low) * (torch.arange(looks) + torch.rand(looks)) / looks)
    z_0, where = latents[rows], M[rows] / (M[rows].sum((1, 2, 3), keepdim=True) * latents.shape[1]).clamp(min=1)
    x_t = teacher.add_noise(z_0, torch.randn_like(z_0), t)
    weight = teacher.snr(t).clamp(max=1) * where
    jobs = [(p, i) for p in range(len(prompts)) for i in range(looks)]
    found = []
    for part in tqdm([jobs[i : i + AT_ONCE] for i in range(0, len(jobs), AT_ONCE)], "naming", leave=False):
        asked, i = zip(*part, strict=True)
        x, s, z, w = (values[list(i)] for values in (x_t, t, z_0, weight))
        names = list(dict.fromkeys(asked))
        c = teacher.encode_prompts([prompts[p] for p in names])[[names.index(p) for p in asked]]
        error = w * (teacher.to_x0(teacher.predict(x, s, c), x, s) - z).square()
        found.append(error.sum((1, 2, 3)))
    return torch.cat(found).reshape(len(prompts), looks).cpu()


def inverted(
    teacher: DiffusionModel,
    latents: Tensor,
    M: Tensor,
    rows: int = 4,
    steps: int = 150,
    batch: int = 8,
    lr: float = 0.02,
) -> Conditioning:
    """`rows` embeddings with which the teacher denoises best what M covers, and the null prompt's."""
    null = teacher.encode_prompts([""])
    if not null.embeds.is_floating_point():
        raise UserError(f"{teacher.name} is told a class, and between classes is nothing: conditioning=words.")
    start = null.expand(rows)
    embeds = nn.Parameter(start.embeds + 0.01 * torch.randn_like(start.embeds))
    extra = {k: nn.Parameter(v.clone()) for k, v in start.extra.items() if k in POOLED}
    optimizer = torch.optim.Adam([embeds, *extra.values()], lr=lr)
    for _ in tqdm(range(steps), "inverting", leave=False):
        own = torch.randint(rows, (batch,), device=embeds.device)
        chosen = torch.randint(len(latents), (batch,), device=latents.device)
        z_0, where = latents[chosen], M[chosen]
        t = teacher.timesteps(torch.rand(batch))
        x_t = teacher.add_noise(z_0, torch.randn_like(z_0), t)
        c = Conditioning(embeds, {**start.extra, **extra})[own]
        with torch.enable_grad():
            error = (teacher.to_x0(teacher.predict(x_t, t, c), x_t, t) - z_0).square()
            loss = (teacher.snr(t).clamp(max=1) * where * error).mean() / where.mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    found = Conditioning(embeds.detach(), {**start.extra, **{k: v.detach() for k, v in extra.items()}})
    return Conditioning.cat([null, found])

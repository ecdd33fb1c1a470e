"""The minimiser of closed-form methods, and the choice of the text states for which it is solved.

The denoiser applies a map W to the text state at every position of a prompt. An edited map W' should map states c to
the outputs of W for other states c*: those of an anchor if c is to be erased, c itself if it is to be preserved.
"""

# N states, D text width, O output width, L tokens.
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from unlearning.erasures.weight_patch import WeightPatch
from unlearning.errors import UserError
from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel

AT_ONCE = 64  # prompts in one call of the text encoders
Positions = Literal["last", "end", "to_end", "from_first", "all"]


def closed_form(c: Tensor, c_star: Tensor, scale: Tensor, lamb: float) -> Tensor:
    """E (D, D), float64, such that for every map W (O, D) the product W E is the minimiser over W' of

        sum_n s_n || W' c_n - W c*_n ||^2  +  lamb || W' - W ||_F^2.

    E = (sum_n s_n c*_n c_n^T + lamb I) (sum_n s_n c_n c_n^T + lamb I)^-1 does not depend on W.

    Args:
        c, c_star: The states, (N, D) each.
        scale: The weights s_n, (N,).
        lamb: Positive.
    """
    c, c_star = c.double(), c_star.double()
    weighted = scale.double()[:, None] * c
    ridge = lamb * torch.eye(c.shape[1], dtype=c.dtype, device=c.device)
    return torch.linalg.solve(c.T @ weighted + ridge, c_star.T @ weighted + ridge, left=False)


def projections(model: DiffusionModel) -> dict[str, nn.Linear]:
    """The maps W (O, D) by full name. Raises UserError if the model reads no text, or if one of them is quantised."""
    maps = dict(model.text_projections())
    model.require_values(f"{name}.weight" for name in maps)
    if not maps:
        raise UserError(f"{model.name} reads no text: there is no map that could be edited. Choose another method.")
    return maps


def pooled_projections(model: DiffusionModel) -> dict[str, nn.Linear]:
    """The maps of the pooled embedding, by full name; none in a model without. Raises UserError for a quantised one."""
    maps = dict(model.pooled_projections())
    model.require_values(f"{name}.weight" for name in maps)
    return maps


def edited(maps: Mapping[str, nn.Linear], E: Tensor) -> WeightPatch:
    """W E for every map W (O, D); E is (D, D), float64. Inputs of a map after the first D stay as they are."""
    D, weights = len(E), {f"{name}.weight": m.weight for name, m in maps.items()}
    return WeightPatch({n: torch.cat([(W[:, :D].double() @ E).to(W.dtype), W[:, D:]], 1) for n, W in weights.items()})


@torch.no_grad()
def pooled(model: DiffusionModel, prompts: Sequence[str]) -> Tensor:
    """The pooled embedding of each prompt, (N, D)."""
    batches = [prompts[i : i + AT_ONCE] for i in range(0, len(prompts), AT_ONCE)] or [prompts]
    return torch.cat([model.encode_prompts(batch).extra["pooled"] for batch in batches])


def pairs(
    model: DiffusionModel, prompts: Sequence[str], anchors: Sequence[str], positions: Positions
) -> tuple[Tensor, Tensor]:
    """The states c of the prompts and c* of their anchors, (N, D) each.

    A prompt and its anchor are aligned at their first chosen position; surplus states of the longer one are dropped.
    The states of encoders that follow the first one (the T5 of Stable Diffusion 3) are aligned at their own first
    position.
    """
    tail = 0 if positions in ("last", "end") else _following(model)
    c, c_star = [], []
    for own, other in zip(states(model, prompts, positions), states(model, anchors, positions), strict=True):
        head, head_star = own[: len(own) - tail], other[: len(other) - tail]
        c += [head[: len(head_star)], own[len(head) :]]
        c_star += [head_star[: len(head)], other[len(head_star) :]]
    return torch.cat(c), torch.cat(c_star)


def _following(model: DiffusionModel) -> int:
    """The number of a prompt's states that follow those of the first text encoder."""
    c = model.encode_prompts([""])
    first = next(iter(model.text_states(c).values()))
    return c.embeds.shape[1] - first.shape[1]


def common_places(model: DiffusionModel, prompts: Sequence[str], anchors: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The states c of the prompts and c* of their anchors at the places that the two have in common, (N, D) each.

    These are their common first tokens, their common last tokens, and the positions of the end of text and of padding
    that both have. The states of encoders that follow the first one are aligned as in `pairs`.
    """
    following = _following(model)
    ids = zip(model.token_ids(prompts), model.token_ids(anchors), strict=True)
    starts = [own.start for own in model.word_pieces(prompts)]
    rows = zip(states(model, prompts, "all"), states(model, anchors, "all"), strict=True)
    parts = []
    for (old, new), start, (c, c_star) in zip(ids, starts, rows, strict=True):
        before, after = common(old, new)
        end, end_star = start + len(old) - after, start + len(new) - after
        first, first_star = len(c) - following, len(c_star) - following  # states of the first encoder
        tail = min(first - end, first_star - end_star)
        head = slice(start + before)
        parts.append((c[head], c_star[head]))
        parts.append((c[end : end + tail], c_star[end_star : end_star + tail]))
        parts.append((c[first:], c_star[first_star:]))
    c, c_star = zip(*parts, strict=True)
    return torch.cat(c), torch.cat(c_star)


def common(old: Sequence[int], new: Sequence[int]) -> tuple[int, int]:
    """The numbers of tokens that two texts share at the beginning, and, of the other tokens, at the end."""
    shorter = min(len(old), len(new))
    before = next((i for i in range(shorter) if old[i] != new[i]), shorter)
    rest = shorter - before
    return before, next((i for i in range(rest) if old[-1 - i] != new[-1 - i]), rest)


def states(model: DiffusionModel, prompts: Sequence[str], positions: Positions) -> list[Tensor]:
    """The text encoder's states of each prompt, one tensor (n, D) for each.

    Args:
        positions: "last": the last word piece. "end": what follows it, the end of text. "to_end": the last word piece
            and all that follows it, end of text and padding. "from_first": the first word piece and all that follows.
            "all": the start of text, too.
    """
    distinct = list(dict.fromkeys(prompts))  # a hundred concepts may have one anchor
    by_prompt = dict(zip(distinct, _states(model, distinct, positions), strict=True))
    return [by_prompt[prompt] for prompt in prompts]


@torch.no_grad()
def _states(model: DiffusionModel, prompts: Sequence[str], positions: Positions) -> Iterator[Tensor]:
    for i in range(0, len(prompts), AT_ONCE):
        batch = prompts[i : i + AT_ONCE]
        c = model.encode_prompts(batch)
        lasts, pieces = model.last_token(batch).tolist(), model.word_pieces(batch)
        for row, last, own, end in zip(c.embeds, lasts, pieces, _ends(c), strict=True):
            first = min(own.start, end - 1)  # a null prompt may be one end of text
            after = min(last + 1, end - 1)  # a text may leave no place for its end
            begin = {"last": last, "end": after, "to_end": last, "from_first": first, "all": 0}[positions]
            yield row[begin : begin + 1 if positions in ("last", "end") else end]


def _ends(c: Conditioning) -> list[int]:
    """The number of states of each row that the denoiser attends to: masked padding is not among them."""
    mask = c.extra.get("mask")
    return [c.embeds.shape[1]] * len(c) if mask is None else mask.sum(1).long().tolist()

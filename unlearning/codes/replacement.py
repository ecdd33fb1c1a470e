"""Replacements for the codes of a concept: one code, random codes, the nearest safe codes, blocks, or fitting codes.

A replacement is a frozen dataclass of settings. `rule(statistics, codebook)` gives a function that fills the cells
`mask` (h, w) bool of a grid of codes (h, w), with a random generator of its own.
"""

# K codes, C their width, S safe codes, h w grid of codes, N blocks, n cells.
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from unlearning.codes.frequency import BLOCK
from unlearning.config.values import Natural, Positive
from unlearning.errors import UserError

Rule = Callable[[Tensor, Tensor, Generator], Tensor]  # (codes, mask, generator) -> codes


@dataclass(frozen=True)
class CodeStatistics:
    """The part of a counting pass that an erasure keeps: E, S, and the counts that its replacement needs.

    Attributes:
        explicit, safe: E, the codes of the concept, and S, the safe codes: indices.
        codes: (K,), how often each code occurs in retain images.
        across, down: (K, K) sparse, how often a code is right of another, and below another.
        blocks: (N, 3, 3), blocks of safe codes.
    """

    explicit: Tensor
    safe: Tensor
    codes: Tensor
    across: Tensor | None = None
    down: Tensor | None = None
    blocks: Tensor | None = None


class Replacement(ABC):
    """A way to fill the cells of a concept.

    Attributes:
        pairs: Whether it needs the counts of pairs.
        blocks: How many blocks it needs.
    """

    pairs: ClassVar[bool] = False
    blocks: ClassVar[int] = 0

    @abstractmethod
    def rule(self, statistics: CodeStatistics, codebook: Tensor) -> Rule:
        """The rule for one model, whose codebook is (K, C)."""


@dataclass(frozen=True)
class Constant(Replacement):
    """The same code in every cell.

    Args:
        code: Its index; 0 in the study.
    """

    code: Natural = 0

    def rule(self, statistics: CodeStatistics, codebook: Tensor) -> Rule:
        if not 0 <= self.code < len(codebook):
            raise UserError(f"There is no code {self.code}: the codebook has {len(codebook)} codes.")
        return lambda codes, mask, generator: codes.masked_fill(mask, self.code)


@dataclass(frozen=True)
class Uniform(Replacement):
    """A uniformly random safe code in each cell: the best replacement of the study, if localized."""

    def rule(self, statistics: CodeStatistics, codebook: Tensor) -> Rule:
        def fill(codes: Tensor, mask: Tensor, generator: Generator) -> Tensor:
            drawn = torch.randint(len(statistics.safe), codes.shape, generator=generator)
            return torch.where(mask, statistics.safe[drawn], codes)

        return fill


@dataclass(frozen=True)
class Nearest(Replacement):
    """The nearest safe code in the codebook, for codes of E only: all other codes stay."""

    def rule(self, statistics: CodeStatistics, codebook: Tensor) -> Rule:
        lookup = torch.arange(len(codebook))
        distances = torch.cdist(codebook[statistics.explicit].float().cpu(), codebook[statistics.safe].float().cpu())
        lookup[statistics.explicit] = statistics.safe[distances.argmin(1)]
        return lambda codes, mask, generator: torch.where(mask, lookup[codes], codes)


@dataclass(frozen=True)
class Blocks(Replacement):
    """Random 3 × 3 blocks of codes from retain images: the study's future work."""

    blocks: ClassVar[int] = 65_536

    def rule(self, statistics: CodeStatistics, codebook: Tensor) -> Rule:
        blocks = statistics.blocks
        assert blocks is not None  # asked for above

        def fill(codes: Tensor, mask: Tensor, generator: Generator) -> Tensor:
            h, w = (-(-side // BLOCK) for side in codes.shape)
            chosen = blocks[torch.randint(len(blocks), (h, w), generator=generator)]
            canvas = chosen.transpose(1, 2).reshape(h * BLOCK, w * BLOCK)[: codes.shape[0], : codes.shape[1]]
            return torch.where(mask, canvas, codes)

        return fill


@dataclass(frozen=True)
class Neighbours(Replacement):
    """Safe codes, drawn with the probability that they occur beside their neighbours in retain images. Ours.

    The code c of a cell is drawn from p(c | n_1 .. n_4) ∝ p(c) prod_d p_d(n_d | c), where n_d are its neighbours: first
    from the rim of the mask inwards, given the neighbours that are already filled; then `sweeps` times for all cells,
    given all four neighbours (Gibbs sampling).

    Args:
        sweeps: The number of Gibbs sweeps.
        shrinkage: The number of pseudo-counts that pull p_d(. | c) towards p.
    """

    pairs: ClassVar[bool] = True

    sweeps: Natural = 5
    shrinkage: Positive = 1.0

    def rule(self, statistics: CodeStatistics, codebook: Tensor) -> Rule:
        safe, p = statistics.safe, (statistics.codes + 1e-3) / (statistics.codes + 1e-3).sum()
        assert statistics.across is not None and statistics.down is not None  # `pairs` asks for them
        right, below = (counts.to_dense().float() for counts in (statistics.across, statistics.down))
        # tables[d][n, c]: log p_d(n | c) of a neighbour n on side d (right, left, below, above) of a safe code c.
        tables = []
        for counts in (right, right.T, below, below.T):
            joint = counts[safe] + self.shrinkage * p
            tables.append((joint / joint.sum(1, keepdim=True)).log().T.contiguous())
        prior = p[safe].log()

        def draw(codes: Tensor, filled: Tensor, places: Tensor, generator: Generator) -> Tensor:
            """Codes for cells (n, 2), given the neighbours that are filled."""
            score = prior.repeat(len(places), 1)
            padded, there = F.pad(codes, (1, 1, 1, 1)), F.pad(filled, (1, 1, 1, 1))
            for table, (dy, dx) in zip(tables, ((0, 1), (0, -1), (1, 0), (-1, 0)), strict=True):
                y, x = (places + 1 + torch.tensor([dy, dx])).T
                score += table[padded[y, x]] * there[y, x, None]
            return safe[torch.multinomial(score.softmax(1), 1, generator=generator)[:, 0]]

        def fill(codes: Tensor, mask: Tensor, generator: Generator) -> Tensor:
            codes, filled = codes.clone(), ~mask
            parity = torch.arange(codes.shape[0])[:, None] + torch.arange(codes.shape[1])
            colours = [parity % 2 == colour for colour in (0, 1)]  # a chessboard: cells of one colour are not adjacent
            while not filled.all():
                rim = _adjacent(filled) & ~filled
                rim = rim if rim.any() else ~filled  # no cell is known if the mask is the whole grid
                for colour in colours:
                    _draw_into(codes, rim & colour, draw, filled, generator)
                    filled = filled | (rim & colour)
            for _ in range(self.sweeps):
                for colour in colours:
                    _draw_into(codes, mask & colour, draw, filled, generator)
            return codes

        return fill


def _adjacent(filled: Tensor) -> Tensor:
    """The cells (h, w) with at least one filled neighbour."""
    there = F.pad(filled, (1, 1, 1, 1))
    return there[1:-1, :-2] | there[1:-1, 2:] | there[:-2, 1:-1] | there[2:, 1:-1]


def _draw_into(codes: Tensor, which: Tensor, draw: Callable, filled: Tensor, generator: Generator) -> None:
    """Draws codes for the cells `which` (h, w) bool, in place."""
    places = which.nonzero()
    if len(places):
        codes[which] = draw(codes, filled, places, generator)

"""What is put in the place of a picture's codes: one code, chance, the nearest safe one, blocks, or what fits.

A replacement is a frozen dataclass of a few settings. `prepared` with what was counted and the codebook, it fills the
places `where` (h, w) bool of a grid of codes (h, w) by a generator of its own.
"""

# K codes, C their width, S safe codes, h w grid, N blocks, n places.
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from unlearning.codes.frequency import BLOCK
from unlearning.errors import UserError

Fill = Callable[[Tensor, Tensor, Generator], Tensor]


@dataclass(frozen=True)
class Counted:
    """What an erasure keeps of a pass over the pictures: E, S, and what its replacement needs besides.

    Attributes:
        explicit, safe: Indices of codes.
        codes: (K,), how often retain pictures have each code.
        across, down: (K, K) sparse, how often a code stands right of another, and below another.
        blocks: (N, 3, 3) of safe codes.
    """

    explicit: Tensor
    safe: Tensor
    codes: Tensor
    across: Tensor | None = None
    down: Tensor | None = None
    blocks: Tensor | None = None


class Replacement(ABC):
    pairs: ClassVar[bool] = False  # whether it needs the counts of pairs
    blocks: ClassVar[int] = 0  # how many blocks it needs

    @abstractmethod
    def prepared(self, known: Counted, codebook: Tensor) -> Fill:
        """The rule for one model; `codebook` is (K, C)."""


@dataclass(frozen=True)
class Constant(Replacement):
    """One code everywhere.

    Args:
        code: Its index; the study's is 0.
    """

    code: int = 0

    def prepared(self, known: Counted, codebook: Tensor) -> Fill:
        if not 0 <= self.code < len(codebook):
            raise UserError(f"There is no code {self.code}: the codebook has {len(codebook)}.")
        return lambda codes, where, generator: codes.masked_fill(where, self.code)


@dataclass(frozen=True)
class Uniform(Replacement):
    """Each a safe code, all equally likely: the study's best, where it is localized."""

    def prepared(self, known: Counted, codebook: Tensor) -> Fill:
        def fill(codes: Tensor, where: Tensor, generator: Generator) -> Tensor:
            chance = torch.randint(len(known.safe), codes.shape, generator=generator)
            return torch.where(where, known.safe[chance], codes)

        return fill


@dataclass(frozen=True)
class Nearest(Replacement):
    """The safe code nearest in the codebook, and only for codes of E: others stay, wherever they are."""

    def prepared(self, known: Counted, codebook: Tensor) -> Fill:
        lookup = torch.arange(len(codebook))
        distances = torch.cdist(codebook[known.explicit].float().cpu(), codebook[known.safe].float().cpu())
        lookup[known.explicit] = known.safe[distances.argmin(1)]
        return lambda codes, where, generator: torch.where(where, lookup[codes], codes)


@dataclass(frozen=True)
class Blocks(Replacement):
    """3 × 3 blocks of codes that some retain picture has, each drawn at random: the study's future work."""

    blocks: ClassVar[int] = 65_536

    def prepared(self, known: Counted, codebook: Tensor) -> Fill:
        def fill(codes: Tensor, where: Tensor, generator: Generator) -> Tensor:
            h, w = (-(-side // BLOCK) for side in codes.shape)
            chosen = known.blocks[torch.randint(len(known.blocks), (h, w), generator=generator)]
            canvas = chosen.transpose(1, 2).reshape(h * BLOCK, w * BLOCK)[: codes.shape[0], : codes.shape[1]]
            return torch.where(where, canvas, codes)

        return fill


@dataclass(frozen=True)
class Neighbours(Replacement):
    """Each a safe code as likely as it stands beside its neighbours in retain pictures, those outside included.

    A place's code c is drawn from p(c | n_1 .. n_4) ∝ p(c) prod_d p_d(n_d | c), of its neighbours known so far, from
    the rim inwards; then every place is drawn again given all four (Gibbs), so many times.

    Args:
        sweeps: How often.
        shrinkage: How many counts p_d(. | c) is drawn towards the codes' own frequencies by.
    """

    pairs: ClassVar[bool] = True

    sweeps: int = 5
    shrinkage: float = 1.0

    def prepared(self, known: Counted, codebook: Tensor) -> Fill:
        safe, p = known.safe, (known.codes + 1e-3) / (known.codes + 1e-3).sum()
        right, below = (counts.to_dense().float() for counts in (known.across, known.down))
        # tables[d][n, c]: log p_d(n | c) of a neighbour n on side d (right, left, below, above) of a safe code c.
        tables = []
        for counts in (right, right.T, below, below.T):
            joint = counts[safe] + self.shrinkage * p
            tables.append((joint / joint.sum(1, keepdim=True)).log().T.contiguous())
        prior = p[safe].log()

        def draw(codes: Tensor, settled: Tensor, places: Tensor, generator: Generator) -> Tensor:
            """Codes for places (n, 2), given the neighbours that are settled."""
            score = prior.repeat(len(places), 1)
            padded, there = F.pad(codes, (1, 1, 1, 1)), F.pad(settled, (1, 1, 1, 1))
            for table, (dy, dx) in zip(tables, ((0, 1), (0, -1), (1, 0), (-1, 0)), strict=True):
                y, x = (places + 1 + torch.tensor([dy, dx])).T
                score += table[padded[y, x]] * there[y, x, None]
            return safe[torch.multinomial(score.softmax(1), 1, generator=generator)[:, 0]]

        def fill(codes: Tensor, where: Tensor, generator: Generator) -> Tensor:
            codes, settled = codes.clone(), ~where
            parity = torch.arange(codes.shape[0])[:, None] + torch.arange(codes.shape[1])
            squares = [parity % 2 == colour for colour in (0, 1)]  # as of a chessboard: none beside its like
            while not settled.all():
                rim = _beside(settled) & ~settled
                rim = rim if rim.any() else ~settled  # nothing is known: the whole grid is to be filled
                for square in squares:
                    _put(codes, rim & square, draw, settled, generator)
                    settled = settled | (rim & square)
            for _ in range(self.sweeps):
                for square in squares:
                    _put(codes, where & square, draw, settled, generator)
            return codes

        return fill


def _beside(settled: Tensor) -> Tensor:
    """The places (h, w) that have a neighbour among the settled ones."""
    there = F.pad(settled, (1, 1, 1, 1))
    return there[1:-1, :-2] | there[1:-1, 2:] | there[:-2, 1:-1] | there[2:, 1:-1]


def _put(codes: Tensor, which: Tensor, draw: Callable, settled: Tensor, generator: Generator) -> None:
    """Draws codes for the places `which` (h, w) bool, in place."""
    places = which.nonzero()
    if len(places):
        codes[which] = draw(codes, settled, places, generator)

"""What a table says, before any format has its way with it: words, ranks, marks and the notes that they point to."""

from collections.abc import Sequence
from dataclasses import dataclass, field

BEST, SECOND = 1, 2  # of the ranks, those that are shown


@dataclass(frozen=True)
class Cell:
    """
    Args:
        text: What is read.
        rank: 1 for the best of those it is compared with, 2 for the second best; 0 where nothing is to be shown.
        marks: Of the notes that are about this cell.
        aside: What stands behind it, unmarked.
        values: What a spreadsheet gets instead, a column each; without them the text.
    """

    text: str
    rank: int = 0
    marks: tuple[str, ...] = ()
    aside: str = ""
    values: tuple[object, ...] = ()


@dataclass(frozen=True)
class Note:
    """A line below the table; `mark` is "" where it is about all of it."""

    text: str
    mark: str = ""


@dataclass(frozen=True)
class Sheet:
    """A table. The first `words` columns are words, which stand left; the others are numbers, which stand right."""

    words: int
    header: Sequence[Cell]
    lines: Sequence[Sequence[Cell]]
    notes: Sequence[Note] = field(default=())

"""What a table says, before any format has its way with it: words, ranks, marks and the notes that they point to."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

BEST, SECOND = 1, 2  # of the ranks, those that are shown
LISTED = 6  # in a note, at most
_SPECIFIC = re.compile(r"\w*\d\w*(?:\.\w+)*")  # a number, a version, a digest


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


# --- the words of notes -----------------------------------------------------------------------------------------------


def listed(names: Iterable[str], separator: str = ", ") -> str:
    """The first of them, and how many more there are."""
    names = list(names)
    return separator.join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


def kind(protocol: str) -> str:
    """What is left of a protocol without its numbers and digests."""
    return _SPECIFIC.sub("…", protocol)


def in_short(protocols: Mapping[tuple, str]) -> str:
    """Protocols by the place where they hold, in a line; the places are tuples of one length.

    What those of a kind share is said once, and of a place as much as they depend on: "1000 real (…). Of cat: f9bfbddf;
    of key: 3ab08c11".
    """
    parts = _telling(protocols)
    kinds: dict[str, dict[str, dict[str, None]]] = {}  # the places by protocol, by kind
    for place, protocol in protocols.items():
        places = kinds.setdefault(kind(protocol), {}).setdefault(protocol, {})
        places[" ".join(str(place[i]) for i in parts)] = None
    return " | ".join(_of_a_kind(places, alone=len(kinds) == 1) for places in kinds.values())


def _telling(protocols: Mapping[tuple, str]) -> list[int]:
    """The parts of a place that its protocol depends on; the first are the first to be left out."""
    kept = list(range(len(next(iter(protocols), ()))))
    for part in range(len(kept)):
        fewer = [i for i in kept if i != part]
        told = {(tuple(place[i] for i in fewer), protocol) for place, protocol in protocols.items()}
        if len({place for place, _ in told}) == len(told):
            kept = fewer
    return kept


def _of_a_kind(places: Mapping[str, Iterable[str]], alone: bool) -> str:
    """Protocols that differ in numbers and digests, each with its places; whether there is no other kind."""
    (first, where), *others = places.items()
    if not others:
        return first if alone else f"of {listed(where)}: {first}"
    values = {protocol: _SPECIFIC.findall(protocol) for protocol in places}
    differ = [len({*column}) > 1 for column in zip(*values.values(), strict=True)]
    shown = iter("…" if differs else value for value, differs in zip(values[first], differ, strict=True))
    own = (
        f"{listed(places[protocol])}: {', '.join(v for v, differs in zip(found, differ, strict=True) if differs)}"
        for protocol, found in values.items()
    )
    return f"{_SPECIFIC.sub(lambda _: next(shown), first)}. Of {'; of '.join(own)}"

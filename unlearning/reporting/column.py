"""One metric of every row: means, what they were measured by, which of them compete and who is best."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import mean, stdev

from unlearning.reporting.grouping import Key, concepts, rivals, shared
from unlearning.reporting.published import Number
from unlearning.reporting.sheet import Cell, in_short, listed

STRANGE, ELSEWHERE, UNEVEN = "†", "¶", "‖"
ARROWS = {True: " ↑", False: " ↓", None: ""}
UNSTATED = "protocol not stated"

Place = tuple  # a run's values of the settings that rivals share, and its concept: where one protocol should hold


@dataclass(frozen=True)
class Mean:
    """One metric over a row's seeds: its mean, the standard error of the mean (None for one seed), and how many.

    And by which protocols where, on which models, and over which concepts.
    """

    mean: float
    error: float | None
    n: int
    measured: tuple[tuple[Place, str], ...]
    models: tuple[str, ...]
    concepts: frozenset[str]

    @classmethod
    def of(cls, runs: Sequence[Mapping], metric: str, by: Sequence[str]) -> "Mean | None":
        """`by` is what rows are told apart by."""
        runs = [r for r in runs if isinstance(r.get(metric), int | float) and r[metric] == r[metric]]  # no null, no NaN
        values = [r[metric] for r in runs]
        names = dict.fromkeys((*shared(by), "concept"))
        measured = dict.fromkeys((tuple(map(r.get, names)), r.get(f"{metric}/protocol", "")) for r in runs)
        models = tuple(dict.fromkeys(str(r.get("model")) for r in runs))
        error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        return cls(mean(values), error, len(values), tuple(measured), models, concepts(runs)) if values else None

    @property
    def protocols(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(protocol for _, protocol in self.measured))

    def text(self, places: int, n: int) -> str:
        """As it is read, in a row of `n` runs."""
        text = f"{self.mean:,.{places}f}" + (f" ± {self.error:,.{places}f}" if self.error is not None else "")
        return text + (f" (n={self.n})" if self.n < n else "")


def decimals(values: Iterable[float]) -> int:
    """How many decimals show the largest of `values` to three or four figures; the others then line up with it."""
    largest = max(map(abs, values), default=0)
    return 0 if largest >= 1000 else 1 if largest >= 10 else 2 if largest >= 1 else 3


def ranks(column: Mapping[Key, float], by: Sequence[str], higher: bool) -> dict[Key, int]:
    """1 for the best of its rivals, 2 for what only one is better than, and so on.

    Where there is nobody to beat there is no best, and where there are two, the loser is no second best.
    """
    places = {}
    for keys in rivals(column, by):
        values = [column[key] for key in keys]
        for key in keys:
            place = 1 + sum(v > column[key] if higher else v < column[key] for v in values)
            if place < len(keys):
                places[key] = place
    return places


def uneven(covered: Mapping[Key, frozenset[str]], by: Sequence[str]) -> dict[Key, str]:
    """The rows that are means over other concepts than most of their rivals, and in what: "without dog"."""
    found = {}
    for keys in rivals(covered, by):
        counts = Counter(covered[key] for key in keys)
        usual = max(counts, key=lambda own: (counts[own], len(own)))
        for key in keys:
            parts = {"without": usual - covered[key], "with": covered[key] - usual}
            if any(parts.values()):
                found[key] = " and ".join(f"{word} {listed(sorted(of))}" for word, of in parts.items() if of)
    return found


@dataclass(frozen=True)
class Column:
    """One metric of every row that has it: ours, the paper's, and whether higher is better (None if nobody knows)."""

    metric: str
    means: Mapping[Key, Mean]
    theirs: Mapping[Key, Number]
    higher: bool | None
    uneven: Mapping[Key, str]  # the rows that have it for other concepts than most of their rivals, and in what

    @cached_property
    def usual(self) -> dict[Place, str]:
        """The protocol of most rows, of rivals and by concept: an FID is measured against pictures of the concept."""
        stated: dict[Place, Counter] = {}
        for cell in self.means.values():
            for place, protocol in cell.measured:
                stated.setdefault(place, Counter())[protocol] += 1
        return {place: counts.most_common(1)[0][0] for place, counts in stated.items()}

    @cached_property
    def protocol(self) -> str:
        """All that are usual, in a line; "" where none is stated."""
        stated = {place: protocol or UNSTATED for place, protocol in self.usual.items()}
        return in_short(stated) if any(self.usual.values()) else ""

    @cached_property
    def strange(self) -> dict[Key, dict[Place, str]]:
        """The rows that were measured otherwise than most rivals, or each seed in its own way: where, and how."""
        found: dict[Key, dict[Place, str]] = {}
        for key, cell in self.means.items():
            for odd in dict.fromkeys(place for place, protocol in cell.measured if protocol != self.usual[place]):
                ways = (protocol or UNSTATED for place, protocol in cell.measured if place == odd)
                found.setdefault(key, {})[odd] = " | ".join(ways)
        return found

    @cached_property
    def elsewhere(self) -> dict[Key, str]:
        """The rows whose published number is not known to be of the same model and protocol, and why."""
        pairs = {key: (self.means[key], number) for key, number in self.theirs.items() if key in self.means}
        reasons = {
            key: number.unlike(ours.models, ours.protocols, ours.concepts) for key, (ours, number) in pairs.items()
        }
        return {key: reason for key, reason in reasons.items() if reason}

    @cached_property
    def digits(self) -> int:
        return decimals(cell.mean for cell in self.means.values())

    def header(self, mark: str, beside: bool) -> Cell:
        parts = ("", "/se", "/protocol", *(("/published", "/delta", "/unlike") if beside else ()))
        values = tuple(self.metric + part for part in parts)
        return Cell(self.metric + ARROWS[self.higher], marks=(mark,) if mark else (), values=values)

    def cell(self, key: Key, n: int, rank: int, beside: bool) -> Cell:
        """Of the row `key` of `n` runs."""
        ours, paper = self.means.get(key), self.theirs.get(key)
        values = [ours.mean, ours.error, " | ".join(ours.protocols)] if ours else [None] * 3
        delta = ours.mean - paper.value if ours and paper else None
        values += [paper and paper.value, delta, self.elsewhere.get(key)] if beside else []
        if ours is None:
            return Cell("–", values=tuple(values))
        aside = f"({paper.value:,.{self.digits}f}, {ours.mean - paper.value:+,.{self.digits}f})" if paper else ""
        aside += ELSEWHERE if key in self.elsewhere else ""
        marks = tuple(mark for mark, rows in ((STRANGE, self.strange), (UNEVEN, self.uneven)) if key in rows)
        return Cell(ours.text(self.digits, n), rank, marks, aside, tuple(values))

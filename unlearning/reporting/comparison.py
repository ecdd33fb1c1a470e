"""The comparison of runs: runs are averaged into rows, and rows compete in each metric.

Rows compete that differ in nothing but the method (grouping.py), are means over the same concepts, and were measured by
the same protocol. The unedited model does not compete.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from statistics import mean, stdev

from unlearning.errors import UserError
from unlearning.reporting.formats import Cell, Note, Table, decimals, listed
from unlearning.reporting.grouping import (
    BY,
    Key,
    Place,
    competitors,
    concepts,
    conditions,
    group_runs,
    label,
    label_cells,
    merged,
    separating,
    shortened,
)
from unlearning.reporting.published import Number, Published, published_number
from unlearning.reporting.runs import UNEDITED, FinishedRun, metric_names

ARROWS = {True: " ↑", False: " ↓", None: ""}
PROTOCOL, REPEATED, SEPARATED, PUBLISHED, COVERAGE = "†‡§¶‖"  # marks of footnotes
UNSTATED = "protocol not stated"


# --- metrics ----------------------------------------------------------------------------------------------------------


def ranks(values: Mapping[Key, float], by: Sequence[str], higher_is_better: bool) -> dict[Key, int]:
    """The rank of each row among its competitors, 1 for the best. Equal values share a rank.

    Rows that are all equal have no rank, and the last of several has none.
    """
    places_of_all: dict[Key, int] = {}
    for keys in competitors(values, by):
        own = [values[key] if higher_is_better else -values[key] for key in keys]
        if min(own) < max(own):
            places = {key: 1 + sum(other > value for other in own) for key, value in zip(keys, own, strict=True)}
            places_of_all |= {key: place for key, place in places.items() if place < len(keys)}
    return places_of_all


def uneven_coverage(covered: Mapping[Key, frozenset[str]], by: Sequence[str]) -> dict[Key, str]:
    """The rows that are means over other concepts than most of their competitors, and the difference: "without dog"."""
    differences = {}
    for keys in competitors(covered, by):
        counts = Counter(covered[key] for key in keys)
        usual = max(counts, key=lambda own: (counts[own], len(own)))
        for key in keys:
            parts = {"without": usual - covered[key], "with": covered[key] - usual}
            if any(parts.values()):
                differences[key] = " and ".join(f"{word} {listed(sorted(of))}" for word, of in parts.items() if of)
    return differences


@dataclass(frozen=True)
class Mean:
    """The mean of a metric over `n` runs of a row, its standard error (None for one run), and its protocols.

    If the runs of one place have different protocols, only those with the most frequent protocol are averaged.
    """

    value: float
    error: float | None
    n: int
    protocols: Mapping[Place, Sequence[str]]

    @classmethod
    def of(cls, runs: Sequence[FinishedRun], metric: str, by: Sequence[str]) -> "Mean":
        """The mean over runs, all of which have the metric."""
        names = dict.fromkeys((*conditions(by), "concept"))
        measured: dict[Place, dict[str, list[float]]] = {}
        for run in runs:
            ways = measured.setdefault(tuple(run[name] for name in names), {})
            ways.setdefault(run.metrics[metric].protocol, []).append(run.metrics[metric].value or 0.0)
        values = [value for ways in measured.values() for value in max(ways.values(), key=len)]
        protocols = {place: list(ways) for place, ways in measured.items()}
        error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        return cls(mean(values), error, len(values), protocols)

    @property
    def all_protocols(self) -> list[str]:
        """The distinct protocols of all places."""
        return list(dict.fromkeys(protocol for ways in self.protocols.values() for protocol in ways))


@dataclass(frozen=True)
class Column:
    """One metric of all rows that have it.

    Attributes:
        higher_is_better: None if neither direction is better.
        means: The mean of each row.
        competing: The means of the rows that compete.
        ranks: The ranks of the rows that compete; empty if the metric has no direction.
        protocol: The most frequent protocol, of each place if places differ; "" if none is stated.
        unusual: The rows with another protocol, or with several, and these protocols by place.
        uneven: The rows whose metric covers other concepts than that of most competitors, and the difference.
        published: A paper's numbers for the same rows.
        incomparable: The rows whose published number is of another model, protocol or set of concepts, and why.
    """

    metric: str
    higher_is_better: bool | None
    means: Mapping[Key, Mean]
    competing: Mapping[Key, float]
    ranks: Mapping[Key, int]
    protocol: str
    unusual: Mapping[Key, Mapping[Place, str]]
    uneven: Mapping[Key, str]
    published: Mapping[Key, Number]
    incomparable: Mapping[Key, str]

    @cached_property
    def places(self) -> int:
        """The number of decimal places."""
        return decimals(row.value for row in self.means.values())

    def header(self, mark: str, compared: bool) -> Cell:
        """`compared` adds the CSV columns of published numbers."""
        parts = ("", "/se", "/protocol", *(("/published", "/delta", "/unlike") if compared else ()))
        values = tuple(self.metric + part for part in parts)
        return Cell(self.metric + ARROWS[self.higher_is_better], marks=(mark,) if mark else (), values=values)

    def cell(self, key: Key, n: int, compared: bool) -> Cell:
        """The cell of the row `key` of `n` runs."""
        ours, paper, places = self.means.get(key), self.published.get(key), self.places
        delta = ours.value - paper.value if ours and paper else None
        values: list[object] = [ours.value, ours.error, " | ".join(ours.all_protocols)] if ours else [None] * 3
        values += [paper and paper.value, delta, self.incomparable.get(key)] if compared else []
        if ours is None:
            return Cell("–", values=tuple(values))
        numbers = [ours.value] if ours.error is None else [ours.value, ours.error]
        text = " ± ".join(f"{number:,.{places}f}" for number in numbers) + (f" (n={ours.n})" if ours.n < n else "")
        aside = f"({paper.value:,.{places}f}, {delta:+,.{places}f})" if paper else ""
        aside += PUBLISHED if key in self.incomparable else ""
        marks = tuple(mark for mark, keys in ((PROTOCOL, self.unusual), (COVERAGE, self.uneven)) if key in keys)
        return Cell(text, self.ranks.get(key, 0), marks, aside, tuple(values))


# --- the comparison ---------------------------------------------------------------------------------------------------


class Comparison:
    """Runs side by side: a row for each combination of settings, a column for each metric.

    Args:
        runs: At least one.
        by: The settings of a row. `separating` adds those that decide a result and differ.
        metrics: Names or patterns ("retention/*"); None for all. Rows without any of them are left out.
        published: A paper's numbers, shown beside ours; None shows none.

    Raises UserError for a pattern that matches no metric.
    """

    def __init__(
        self,
        runs: Sequence[FinishedRun],
        by: Sequence[str] = BY,
        metrics: Sequence[str] | None = None,
        published: Published | None = None,
    ):
        chosen = _matching(metric_names(runs), metrics)
        runs = merged(runs)
        self.by = separating(runs, by)
        self.added = self.by[len(by) :]
        self.rows = {
            key: group
            for key, group in group_runs(runs, self.by).items()
            if metrics is None or any(run.value(metric) is not None for run in group for metric in chosen)
        }
        self.published = published
        self.unedited = {key for key, group in self.rows.items() if {run["method"] for run in group} == {UNEDITED}}
        self.uneven = uneven_coverage({key: concepts(group) for key, group in self.rows.items()}, self.by)
        self.columns = {metric: self._column(metric) for metric in chosen}

    def _column(self, metric: str) -> Column:
        having = {key: [run for run in runs if run.value(metric) is not None] for key, runs in self.rows.items()}
        having = {key: runs for key, runs in having.items() if runs}
        means = {key: Mean.of(runs, metric, self.by) for key, runs in having.items()}
        stated = (run.metrics[metric].higher_is_better for runs in having.values() for run in runs)
        higher = next((direction for direction in stated if direction is not None), None)

        counts: dict[Place, Counter] = {}  # how many rows have which protocol
        for row in means.values():
            for place, ways in row.protocols.items():
                counts.setdefault(place, Counter()).update(ways)
        usual = {place: ways.most_common(1)[0][0] for place, ways in counts.items()}
        unusual: dict[Key, dict[Place, str]] = {}
        for key, row in means.items():
            for place, ways in row.protocols.items():
                if ways != [usual[place]]:
                    unusual.setdefault(key, {})[place] = " | ".join(way or UNSTATED for way in ways)
        protocol = shortened({p: way or UNSTATED for p, way in usual.items()}) if any(usual.values()) else ""

        covered = {key: concepts(runs) for key, runs in having.items() if key not in self.uneven and higher is not None}
        uneven = uneven_coverage(covered, self.by)
        aside = {*self.unedited, *self.uneven, *uneven, *unusual}
        competing = {key: row.value for key, row in means.items() if key not in aside}

        settings = {key: dict(zip(self.by, key, strict=True)) for key in self.rows}
        papers = {key: published_number(self.published or {}, settings[key], metric) for key in self.rows}
        published = {key: number for key, number in papers.items() if number}
        incomparable: dict[Key, str] = {}
        for key in (key for key in means if key in published):
            models = dict.fromkeys(str(run["model"]) for run in having[key])
            why = published[key].difference([*models], means[key].all_protocols, concepts(having[key]))
            incomparable |= {key: why} if why else {}
        ranked = {} if higher is None else ranks(competing, self.by, higher)
        return Column(metric, higher, means, competing, ranked, protocol, unusual, uneven, published, incomparable)

    @cached_property
    def table(self) -> Table:
        """The rows and columns as a table with footnotes."""
        compared, columns = self.published is not None, self.columns.values()
        protocols = list(dict.fromkeys(column.protocol for column in columns if column.protocol))
        header = [*(Cell(name, marks=(SEPARATED,) if name in self.added else ()) for name in self.by), Cell("n")]
        for column in columns:
            header.append(column.header(str(1 + protocols.index(column.protocol)) if column.protocol else "", compared))
        repeated = {key for key, group in self.rows.items() if _repeats(group)}
        lines = []
        for key, group in self.rows.items():
            marks = tuple(mark for mark, keys in ((REPEATED, repeated), (COVERAGE, self.uneven)) if key in keys)
            cells = [column.cell(key, len(group), compared) for column in columns]
            lines.append([*label_cells(key), Cell(str(len(group)), marks=marks), *cells])
        notes = [Note(protocol, str(i)) for i, protocol in enumerate(protocols, 1)]
        notes += [*_protocol_notes(columns), *self._coverage_note(), *self._separation_note()]
        if repeated:
            text = "Some of these runs have the same seed, so they differ in another setting. Name it after --by."
            notes.append(Note(text, REPEATED))
        notes += _published_notes(columns) if compared else []
        return Table(len(self.by), header, lines, notes)

    def _coverage_note(self) -> Iterator[Note]:
        rows = [f"{label(key)} {of}" for key, of in self.uneven.items()]
        rows += [f"{c.metric} of {label(key)} {of}" for c in self.columns.values() for key, of in c.uneven.items()]
        if rows:
            yield Note(f"Mean over other concepts than most rows, so it is not ranked: {listed(rows, '; ')}.", COVERAGE)

    def _separation_note(self) -> Iterator[Note]:
        shared = conditions(self.added)
        own = [name for name in self.added if name not in shared]
        parts = [f"These runs differ in {', '.join(shared)}: they are neither averaged nor compared."] if shared else []
        parts += [f"Runs of one method differ in {', '.join(own)}: they are not averaged."] if own else []
        if parts:
            yield Note(" ".join(parts), SEPARATED)


def _matching(available: Sequence[str], patterns: Sequence[str] | None) -> list[str]:
    for pattern in patterns or ():
        if not any(fnmatchcase(metric, pattern) for metric in available):
            raise UserError(f"No run has the metric {pattern}. There are: {', '.join(available)}.")
    return list(dict.fromkeys(m for p in patterns or ["*"] for m in available if fnmatchcase(m, p)))


def _repeats(runs: Sequence[FinishedRun]) -> bool:
    """Whether two runs of a row have the same seed, concept and method."""
    return len({tuple(run[name] for name in ("seed", *BY)) for run in runs}) < len(runs)


def _protocol_notes(columns: Iterable[Column]) -> Iterator[Note]:
    """The protocols of the marked cells: one note for each set of rows with the same protocols."""
    notes: dict[tuple[str, str], list[str]] = {}
    for column in columns:
        ways = {(*key, *place): way for key, own in column.unusual.items() for place, way in own.items()}
        if ways:
            notes.setdefault((listed(map(label, column.unusual), "; "), shortened(ways)), []).append(column.metric)
    for (rows, text), metrics in notes.items():
        yield Note(f"{', '.join(metrics)} of {rows}: {text}", PROTOCOL)


def _published_notes(columns: Iterable[Column]) -> Iterator[Note]:
    """The sources of the published numbers; and for each reason, the metrics and rows that are not comparable."""
    sources = dict.fromkeys(n.source for c in columns for key, n in c.published.items() if key in c.means)
    text = f"In parentheses: the published number, and ours minus it. Published: {'; '.join(sources)}."
    yield Note(text if sources else "The file of published numbers has none for these rows.")
    where: dict[str, list[str]] = {}
    for column in columns:
        for reason in dict.fromkeys(column.incomparable.values()):
            keys = [key for key, other in column.incomparable.items() if other == reason]
            everywhere = len(keys) == len(column.published.keys() & column.means)
            rows = "" if everywhere else f" of {listed(map(label, keys), '; ')}"
            where.setdefault(reason, []).append(column.metric + rows)
    for reason, metrics in where.items():
        yield Note(f"{', '.join(metrics)}: {reason}.", PUBLISHED)

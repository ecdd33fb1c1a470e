"""Runs side by side: a row per setting, each metric's mean over the row's seeds and the standard error of that mean.

What may be compared is compared: in a column, the methods that differ in nothing else, are means over the same concepts
and were measured by the protocol that is usual among them. The unedited model does not compete.
"""

from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase

from unlearning.errors import UserError
from unlearning.reporting.column import ELSEWHERE, STRANGE, UNEVEN, Column, Mean, Place, ranks, uneven
from unlearning.reporting.grouping import Key, concepts, grouped, shared, told_apart
from unlearning.reporting.published import Number, beside
from unlearning.reporting.rows import BY, UNEDITED, directions, measured
from unlearning.reporting.sheet import Cell, Note, Sheet, in_short, kind, listed

REPEATED, APART = "‡", "§"


def words(key: Key) -> list[Cell]:
    """The cells that say which row it is."""
    return [Cell("–" if value is None else str(value), values=(value,)) for value in key]


def named(key: Key) -> str:
    """A row in a note."""
    return ", ".join(cell.text for cell in words(key))


def chosen(runs: Sequence[Mapping], patterns: Sequence[str] | None) -> list[str]:
    """The metrics that `patterns` name; all without any. Raises UserError for a pattern that names none."""
    available = measured(dict.fromkeys(name for run in runs for name in run))
    for pattern in patterns or ():
        if not any(fnmatchcase(m, pattern) for m in available):
            raise UserError(f"No run has the metric {pattern}. There are: {', '.join(available)}.")
    return list(dict.fromkeys(m for p in patterns or ["*"] for m in available if fnmatchcase(m, p)))


def compare(
    runs: Sequence[Mapping],
    metrics: Sequence[str] | None = None,
    by: Sequence[str] = BY,
    numbers: Mapping[tuple[str, str, str], Number] | None = None,
) -> Sheet:
    """The runs as a table, beside a paper's `numbers` where it has any for them.

    Its rows are told apart by `by`, and by what `told_apart` adds to that.
    """
    asked, by = by, told_apart(runs, by)
    added = by[len(asked) :]
    groups, better, columns = grouped(runs, by), directions(runs), []
    unedited = {key for key, group in groups.items() if {run.get("method") for run in group} == {UNEDITED}}
    partial = uneven({key: concepts(group) for key, group in groups.items()}, by)
    for metric in chosen(runs, metrics):
        means = {key: mean for key, group in groups.items() if (mean := Mean.of(group, metric, by))}
        theirs = {key: n for key in groups if (n := beside(numbers or {}, by, key, metric))}
        covered = {key: mean.concepts for key, mean in means.items() if metric in better and key not in partial}
        columns.append(Column(metric, means, theirs, better.get(metric), uneven(covered, by)))

    header = [*(Cell(name, marks=(APART,) if name in added else ()) for name in by), Cell("n")]
    repeated = {key for key, group in groups.items() if _repeated(group)}
    lines = {}
    for key, group in groups.items():
        marks = tuple(mark for mark, rows in ((REPEATED, repeated), (UNEVEN, partial)) if key in rows)
        lines[key] = [*words(key), Cell(str(len(group)), marks=marks)]
    protocols = list(dict.fromkeys(c.protocol for c in columns if c.protocol))
    for c in columns:
        header.append(c.header(str(1 + protocols.index(c.protocol)) if c.protocol else "", numbers is not None))
        aside = {*unedited, *partial, *c.uneven, *c.strange}
        competing = {key: mean.mean for key, mean in c.means.items() if key not in aside}
        places = ranks(competing, by, c.higher) if c.higher is not None else {}
        for key, group in groups.items():
            lines[key].append(c.cell(key, len(group), places.get(key, 0), numbers is not None))

    notes = [Note(protocol, str(i)) for i, protocol in enumerate(protocols, 1)]
    notes += [*_strange(columns), *_uneven(partial, columns), *_apart(added)]
    if repeated:
        text = "Some of these runs share even the seed, so they differ in another setting; name it after --by."
        notes.append(Note(text, REPEATED))
    if numbers is not None:
        sources = dict.fromkeys(n.source for c in columns for key, n in c.theirs.items() if key in c.means)
        text = f"In brackets: the published number, and ours less it. Published: {'; '.join(sources)}."
        notes.append(Note(text if sources else "Of these rows nothing is published in the file that was named."))
        notes += _elsewhere(columns)
    return Sheet(len(by), header, list(lines.values()), notes)


def _strange(columns: Sequence[Column]) -> Iterator[Note]:
    """How the marked were measured: a note a kind of protocol, of metrics and rows."""
    found: dict[tuple[str, str], list[str]] = {}
    for column in columns:
        kinds: dict[str, dict[Key, dict[Place, str]]] = {}
        for key, ways in column.strange.items():
            for place, way in ways.items():
                kinds.setdefault(kind(way), {}).setdefault(key, {})[place] = way
        for rows in kinds.values():
            told = in_short({(*key, *place): way for key, ways in rows.items() for place, way in ways.items()})
            found.setdefault((listed(map(named, rows), "; "), told), []).append(column.metric)
    for (rows, told), metrics in found.items():
        yield Note(f"{', '.join(metrics)} of {rows}: {told}", STRANGE)


def _uneven(partial: Mapping[Key, str], columns: Sequence[Column]) -> Iterator[Note]:
    """Which means are over other concepts than most."""
    told = [f"{named(key)} {of}" for key, of in partial.items()]
    told += [f"{c.metric} of {named(key)} {of}" for c in columns for key, of in c.uneven.items()]
    if told:
        yield Note(f"Means over other concepts than most, and not compared: {listed(told, '; ')}.", UNEVEN)


def _apart(added: Sequence[str]) -> Iterator[Note]:
    """Why there are columns that nobody asked for."""
    conditions = shared(added)
    own = [name for name in added if name not in conditions]
    told = []
    if conditions:
        told.append(f"These runs differ in {', '.join(conditions)}: those that do are neither averaged nor compared.")
    if own:
        told.append(f"Runs of one method differ in {', '.join(own)}: those that do are not averaged.")
    if told:
        yield Note(" ".join(told), APART)


def _elsewhere(columns: Sequence[Column]) -> list[Note]:
    """Why published numbers are not known to compare with ours: a note a reason, of metrics or some of their rows."""
    found: dict[str, list[str]] = {}
    for column in columns:
        reasons = column.elsewhere
        everywhere = len({*reasons.values()}) == 1 and len(reasons) == len(column.means.keys() & column.theirs.keys())
        for reason in dict.fromkeys(reasons.values()):
            of = listed((named(key) for key, told in reasons.items() if told == reason), "; ")
            found.setdefault(reason, []).append(column.metric if everywhere else f"{column.metric} of {of}")
    return [Note(f"{', '.join(where)}: {reason}.", ELSEWHERE) for reason, where in found.items()]


def _repeated(runs: Sequence[Mapping]) -> bool:
    """Whether a row has the same seed of the same concept and method twice."""
    return len({tuple(map(run.get, ("seed", *BY))) for run in runs}) < len(runs)

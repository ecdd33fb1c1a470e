"""Runs side by side: a row per setting, each metric's mean over the row's seeds and the standard error of that mean.

What may be compared is compared: in a column, the methods that differ in nothing else, are means over the same concepts
and were measured by the protocol that is usual among them. Runs of another model, dataset or sampler have rows of their
own, and so have those of one method with other settings. The unedited model does not compete.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import accumulate
from statistics import mean, stdev

from unlearning.concepts import UserError
from unlearning.reporting.published import Number, beside
from unlearning.reporting.rows import BY, UNEDITED, directions, measured
from unlearning.reporting.sheet import Cell, Note, Sheet, in_short, kind, listed

STRANGE, REPEATED, APART, ELSEWHERE, UNEVEN = "†", "‡", "§", "¶", "‖"
GROUPS = ("model", "dataset", "sampler", "method", "trainer")  # whose settings decide a result
OWN = ("method", "trainer")  # of these, those in which rivals may differ
IDLE = ("sampler.batch_size", "model.device", "model.offload", "model.attention_slicing", "model.compile")
ARROWS = {True: " ↑", False: " ↓", None: ""}
UNSTATED = "protocol not stated"

Key = tuple  # a row's values of the settings that rows are told apart by
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


def _first_the_unedited(value: object) -> tuple:
    return (0, value, "") if isinstance(value, int | float) else (value != UNEDITED, 0, str(value))


def grouped(runs: Iterable[Mapping], by: Sequence[str]) -> dict[Key, list[Mapping]]:
    """The runs of each row, in the order of the rows."""
    groups: dict[Key, list[Mapping]] = {}
    for run in runs:
        groups.setdefault(tuple(run.get(key) for key in by), []).append(run)
    return {key: groups[key] for key in sorted(groups, key=lambda key: [_first_the_unedited(v) for v in key])}


def concepts(runs: Iterable[Mapping]) -> frozenset[str]:
    return frozenset(str(run.get("concept")) for run in runs)


def group_of(setting: str) -> str:
    """The Hydra group that a setting is of: "method", of method.eta and of student@method.student."""
    return setting.rpartition("@")[2].partition(".")[0]


def shared(by: Sequence[str]) -> list[str]:
    """Of the settings that rows are told apart by, those that rivals have in common: all but the method's own."""
    return [name for name in by if group_of(name) not in OWN]


def told_apart(runs: Sequence[Mapping], by: Sequence[str]) -> tuple[str, ...]:
    """`by` and, of the settings that decide a result, those in which runs differ that would be averaged or compete.

    As few as tell it all. A setting that a run does not state differs from nothing; nor does one that changes how fast
    a result is made, or that goes with the concept.
    """
    names = [name for name in dict.fromkeys(n for run in runs for n in run) if group_of(name) in GROUPS]
    found = [name for name in names if _differ(runs, name) and not _idle(name)]
    for name in sorted(found, key=_precedence):
        if name not in by and any(_differ(group, name) for group in grouped(runs, _alike(name, by)).values()):
            by = (*by, name)
    return tuple(by)


def _differ(runs: Iterable[Mapping], name: str) -> bool:
    return len({repr(run.get(name)) for run in runs if name in run or _is_null(run, name)}) > 1


def _is_null(run: Mapping, name: str) -> bool:
    """Whether a run states that there is nothing of which this could be a setting, as a null scheduler has no rate."""
    return any(run.get(above, run) is None for above in accumulate(name.split("."), "{}.{}".format))


def _idle(name: str) -> bool:
    """Whether no result depends on a setting: it makes it faster or, a trainer's, is about what is told and where."""
    if group_of(name) != "trainer":
        return name in IDLE
    from unlearning.naming import OUTWARD  # and Hydra with it, for which a command's --help is not to wait

    return name.partition(".")[2].partition(".")[0] in OUTWARD


def _precedence(name: str) -> tuple[bool, bool]:
    """What rivals share comes first, for a method's settings may follow it; and what was chosen of a group, for it says
    more than its settings.
    """
    return group_of(name) in OWN, "." in name and "@" not in name


def _alike(name: str, by: Sequence[str]) -> list[str]:
    """The settings by which runs belong together that must not differ in the setting `name`.

    A method's own are held against those of the same method, model, dataset and concept, for they may follow these. The
    dataset's may be the concept's, as its template or its neighbours are.
    """
    if group_of(name) in OWN:
        return list(dict.fromkeys((*by, *BY)))
    if name.startswith("dataset.") and name != "dataset.images_per_prompt":
        return list(dict.fromkeys((*shared(by), "concept")))
    return shared(by)


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


def rivals(keys: Iterable[Key], by: Sequence[str]) -> list[list[Key]]:
    """Those of the rows that differ in the method and its settings alone, together."""
    places = [i for i, name in enumerate(by) if name in shared(by)]
    found: dict[tuple, list[Key]] = {}
    for key in keys:
        found.setdefault(tuple(key[i] for i in places), []).append(key)
    return list(found.values())


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

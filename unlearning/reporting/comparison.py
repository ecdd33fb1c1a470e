"""Runs side by side: a row per setting, each metric's mean over the row's seeds and the standard error of that mean.

What may be compared is compared: in a column, the methods that differ in nothing else and were measured by the column's
usual protocol. Runs of another model, sampler or number of pictures have rows of their own. The unedited model does
not compete.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from statistics import mean, stdev

from unlearning.concepts import UserError
from unlearning.reporting.published import Number, beside
from unlearning.reporting.rows import BY, UNEDITED, directions, measured
from unlearning.reporting.sheet import Cell, Note, Sheet

STRANGE, REPEATED, APART, ELSEWHERE = "†", "‡", "§", "¶"
CONDITIONS = ("model", "sampler", "dataset.images_per_prompt")  # what runs that are compared have in common
IDLE = ("sampler.batch_size", "model.device", "model.offload", "model.attention_slicing", "model.compile")
ARROWS = {True: " ↑", False: " ↓", None: ""}
_WITHIN = tuple(f"{name}." for name in CONDITIONS)

Key = tuple  # a row's values of the settings that rows are told apart by


@dataclass(frozen=True)
class Mean:
    """One metric over a row's seeds: its mean, the standard error of the mean (None for one seed), and how many.

    And what it was measured by, and on which models.
    """

    mean: float
    error: float | None
    n: int
    protocols: tuple[str, ...]
    models: tuple[str, ...]

    @classmethod
    def of(cls, runs: Sequence[Mapping], metric: str) -> "Mean | None":
        runs = [r for r in runs if isinstance(r.get(metric), int | float) and r[metric] == r[metric]]  # no null, no NaN
        values = [r[metric] for r in runs]
        protocols = tuple(dict.fromkeys(r.get(f"{metric}/protocol", "") for r in runs))
        models = tuple(dict.fromkeys(str(r.get("model")) for r in runs))
        error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        return cls(mean(values), error, len(values), protocols, models) if values else None

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


def shared(by: Sequence[str]) -> list[str]:
    """Of the settings that rows are told apart by, those that rivals have in common: all but the method's."""
    return [name for name in by if name.partition(".")[0] != "method"]


def told_apart(runs: Sequence[Mapping], by: Sequence[str]) -> tuple[str, ...]:
    """`by` and, of the conditions, those in which runs differ that would be averaged or compete; as few as tell it all.

    A setting that a run does not state differs from nothing; nor does one that changes how fast a picture is made.
    """
    found = [n for n in dict.fromkeys(n for run in runs for n in run) if n in CONDITIONS or n.startswith(_WITHIN)]
    for name in sorted(found, key=lambda name: "." in name):  # what was chosen of a group says more than its settings
        rivals = grouped(runs, shared(by)).values()
        if name not in (*by, *IDLE) and any(len({repr(r[name]) for r in group if name in r}) > 1 for group in rivals):
            by = (*by, name)
    return tuple(by)


def words(key: Key) -> list[Cell]:
    """The cells that say which row it is."""
    return [Cell("–" if value is None else str(value), values=(value,)) for value in key]


def chosen(runs: Sequence[Mapping], patterns: Sequence[str] | None) -> list[str]:
    """The metrics that `patterns` name; all without any. Raises UserError for a pattern that names none."""
    available = measured(dict.fromkeys(name for run in runs for name in run))
    for pattern in patterns or ():
        if not any(fnmatchcase(m, pattern) for m in available):
            raise UserError(f"No run has the metric {pattern}. There are: {', '.join(available)}.")
    return list(dict.fromkeys(m for p in patterns or ["*"] for m in available if fnmatchcase(m, p)))


def ranks(column: Mapping[Key, float], by: Sequence[str], higher: bool) -> dict[Key, int]:
    """1 for the best of those that differ in the method alone, 2 for what only one is better than, and so on.

    Where there is nobody to beat there is no best, and where there are two, the loser is no second best.
    """
    rivals: dict[Key, list[Key]] = {}
    common = shared(by)
    for key in column:
        rivals.setdefault(tuple(v for name, v in zip(by, key, strict=True) if name in common), []).append(key)
    places = {}
    for keys in rivals.values():
        values = [column[key] for key in keys]
        for key in keys:
            place = 1 + sum(v > column[key] if higher else v < column[key] for v in values)
            if place < len(keys):
                places[key] = place
    return places


@dataclass(frozen=True)
class Column:
    """One metric of every row that has it: ours, the paper's, and whether higher is better (None if nobody knows)."""

    metric: str
    means: Mapping[Key, Mean]
    theirs: Mapping[Key, Number]
    higher: bool | None

    @cached_property
    def usual(self) -> str | None:
        """The protocol of most cells; None where each is a mean over several."""
        stated = Counter(cell.protocols[0] for cell in self.means.values() if len(cell.protocols) == 1)
        return stated.most_common(1)[0][0] if stated else None

    @cached_property
    def strange(self) -> list[Key]:
        """The rows that were measured in another way than most, or each seed in its own."""
        return [key for key, cell in self.means.items() if cell.protocols != (self.usual,)]

    @cached_property
    def elsewhere(self) -> dict[Key, str]:
        """The rows whose published number is not known to be of the same model and protocol, and why."""
        pairs = {key: (self.means[key], number) for key, number in self.theirs.items() if key in self.means}
        reasons = {key: number.unlike(ours.models, ours.protocols) for key, (ours, number) in pairs.items()}
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
        marks = (STRANGE,) if key in self.strange else ()
        return Cell(ours.text(self.digits, n), rank, marks, aside, tuple(values))

    def notes(self) -> list[Note]:
        def stated(key: Key) -> str:
            return " | ".join(protocol or "protocol not stated" for protocol in self.means[key].protocols)

        return [Note(f"{self.metric} of {', '.join(map(str, key))}: {stated(key)}", STRANGE) for key in self.strange]


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
    for metric in chosen(runs, metrics):
        means = {key: mean for key, group in groups.items() if (mean := Mean.of(group, metric))}
        theirs = {key: n for key in groups if (n := beside(numbers or {}, by, key, metric))}
        columns.append(Column(metric, means, theirs, better.get(metric)))

    header = [*(Cell(name, marks=(APART,) if name in added else ()) for name in by), Cell("n")]
    repeated = {key for key, group in groups.items() if _repeated(group)}
    lines = {
        key: [*words(key), Cell(str(len(group)), marks=(REPEATED,) if key in repeated else ())]
        for key, group in groups.items()
    }
    protocols = list(dict.fromkeys(c.usual for c in columns if c.usual))
    for c in columns:
        header.append(c.header(str(1 + protocols.index(c.usual)) if c.usual else "", numbers is not None))
        rivals = {k: mean.mean for k, mean in c.means.items() if k not in unedited and k not in c.strange}
        places = ranks(rivals, by, c.higher) if c.higher is not None else {}
        for key, group in groups.items():
            lines[key].append(c.cell(key, len(group), places.get(key, 0), numbers is not None))

    notes = [Note(protocol, str(i)) for i, protocol in enumerate(protocols, 1)]
    notes += [note for c in columns for note in c.notes()]
    if added:
        text = f"These runs differ in {', '.join(added)}: those that do are neither averaged nor compared."
        notes.append(Note(text, APART))
    if repeated:
        text = "Some of these runs share even the seed, so they differ in another setting; name it after --by."
        notes.append(Note(text, REPEATED))
    if numbers is not None:
        sources = dict.fromkeys(n.source for c in columns for key, n in c.theirs.items() if key in c.means)
        text = f"In brackets: the published number, and ours less it. Published: {'; '.join(sources)}."
        notes.append(Note(text if sources else "Of these rows nothing is published in the file that was named."))
        notes += _elsewhere(columns)
    return Sheet(len(by), header, list(lines.values()), notes)


def _elsewhere(columns: Sequence[Column]) -> list[Note]:
    """Why published numbers are not known to compare with ours: a note a reason, of metrics or some of their rows."""
    found: dict[str, list[str]] = {}
    for column in columns:
        reasons = column.elsewhere
        everywhere = len({*reasons.values()}) == 1 and len(reasons) == len(column.means.keys() & column.theirs.keys())
        for reason in dict.fromkeys(reasons.values()):
            of = "; ".join(", ".join(map(str, key)) for key, told in reasons.items() if told == reason)
            found.setdefault(reason, []).append(column.metric if everywhere else f"{column.metric} of {of}")
    return [Note(f"{', '.join(where)}: {reason}.", ELSEWHERE) for reason, where in found.items()]


def _repeated(runs: Sequence[Mapping]) -> bool:
    """Whether a row has the same seed of the same concept and method twice."""
    return len({tuple(map(run.get, ("seed", *BY))) for run in runs}) < len(runs)

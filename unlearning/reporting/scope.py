"""What is averaged into one table of a page, with its plot and the answers that it gives."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from unlearning.reporting.column import ARROWS, STRANGE, UNEVEN
from unlearning.reporting.comparison import compare
from unlearning.reporting.gallery import Shot
from unlearning.reporting.grouping import Key, concepts, grouped, rivals, shared
from unlearning.reporting.pareto import Plot, Point
from unlearning.reporting.rows import UNEDITED, directions
from unlearning.reporting.sheet import Cell, Sheet

BEFORE = "the model before"


@dataclass(frozen=True)
class Line:
    """A row of the table, under the name that it has on the page."""

    key: Key
    label: str
    coverage: str  # "2 of 10 concepts", where it is a mean over fewer than other rows
    n: Cell
    cells: Mapping[str, Cell]  # by metric

    @property
    def method(self) -> str:
        return self.key[0]


@dataclass(frozen=True)
class Tile:
    """One answer: who, by which numbers."""

    question: str
    lines: Sequence[Line]
    metric: str
    cell: Cell
    before: str


@dataclass(frozen=True)
class Scope:
    """What is averaged into one table: all concepts of a world, or one of them."""

    concept: str  # "" for all
    runs: Sequence[Mapping]
    by: Sequence[str]
    shots: list[Shot] = field(default_factory=list)

    @cached_property
    def groups(self) -> dict[Key, list[Mapping]]:
        return grouped(self.runs, self.by)

    @cached_property
    def sheet(self) -> Sheet:
        return compare(self.runs, by=self.by)

    @cached_property
    def metrics(self) -> dict[str, Cell]:
        """The header's cells."""
        return {cell.values[0]: cell for cell in self.sheet.header[self.sheet.words + 1 :]}

    def purposes(self, *, cost: bool) -> dict[str, list[str]]:
        """The metrics by purpose: those of cost, or the others."""
        found: dict[str, list[str]] = {}
        for metric in self.metrics:
            purpose = metric.partition("/")[0]
            if (purpose == "cost") == cost:
                found.setdefault(purpose, []).append(metric)
        return found

    @cached_property
    def lines(self) -> list[Line]:
        words, found = self.sheet.words, []
        for key, cells in zip(self.groups, self.sheet.lines, strict=True):
            numbers = dict(zip(self.metrics, cells[words + 1 :], strict=True))
            found.append(Line(key, self._label(key), self._coverage(key), cells[words], numbers))
        return found

    def _label(self, key: Key) -> str:
        """The method, with those of its settings that vary, and what it does not share with most: "uce, steps 20"."""
        same = [other for other in self.groups if other[0] == key[0]]
        told = []
        for i, name in enumerate(self.by):
            usual = Counter(other[i] for other in self.groups).most_common(1)[0][0]
            if len({other[i] for other in same}) > 1 or (name in shared(self.by) and key[i] != usual):
                told.append(f"{name.rpartition('.')[2]} {key[i]}")
        return ", ".join([str(key[0]), *told])

    def _coverage(self, key: Key) -> str:
        own, all_ = (len(concepts(runs)) for runs in (self.groups[key], self.runs))
        return f"{own} of {all_} concepts" if own < all_ else ""

    @cached_property
    def comparable(self) -> list[Key]:
        """The rows that the answers are about: those of most methods under the same conditions."""
        return max(rivals(self.groups, self.by), key=len)

    def competes(self, line: Line, metric: str | None) -> bool:
        """Whether it has the metric as its rivals do: by the same protocol, over the same concepts."""
        cell = line.cells.get(metric)
        if line.key not in self.comparable or line.method == UNEDITED or cell is None or cell.values[0] is None:
            return False
        return not {STRANGE, UNEVEN} & {*line.n.marks, *cell.marks}

    @cached_property
    def higher(self) -> dict[str, bool]:
        known = directions(self.runs)
        return {metric: known[metric] for metric in self.metrics if metric in known}

    def first(self, *purposes: str) -> str | None:
        """The first metric of the purposes, in their order, that has a better and a worse."""
        return next((m for p in purposes for m in self.higher if m.partition("/")[0] == p), None)

    @cached_property
    def axes(self) -> tuple[str | None, str | None]:
        return self.first("efficacy", "robustness"), self.first("retention", "fidelity")

    @cached_property
    def base(self) -> Line | None:
        unedited = [line for line in self.lines if line.method == UNEDITED]
        return next((line for line in unedited if line.key in self.comparable), next(iter(unedited), None))

    @cached_property
    def plot(self) -> Plot | None:
        x, y = self.axes
        if not x or not y:
            return None
        points = []
        for line in self.lines:
            a, b = line.cells[x], line.cells[y]
            if a.values[0] is not None and b.values[0] is not None:
                competes = self.competes(line, x) and self.competes(line, y)
                errors = (a.values[1] or 0.0, b.values[1] or 0.0)
                label = line.label if line.method != UNEDITED else BEFORE
                points.append(Point(label, line.method, a.values[0], b.values[0], *errors, competes))
        names = [metric.partition("/")[2] + ARROWS[self.higher[metric]] for metric in (x, y)]
        return Plot.of(points, *names, (self.higher[x], self.higher[y])) if any(p.competes for p in points) else None

    @cached_property
    def tiles(self) -> list[Tile]:
        """The answers that the page opens with."""
        forgets, keeps = self.axes
        overall = self.first("summary")
        found = [self._tile("forgets most", forgets), self._tile("best of both", overall)]
        if forgets and self._change(self.base, forgets) is None:
            found += [self._tile("harms least", keeps)]
        else:
            gains = [(self._change(line, forgets) or 0.0, line) for line in self.lines if self.competes(line, forgets)]
            best = max((gain for gain, _ in gains), default=0.0)
            able = [line for gain, line in gains if best and gain >= best / 2]
            found += [self._tile("harms least of those that forget", keeps, able)]
            found += [self._tile("cheapest of those that forget", "cost/seconds", able, higher=False)]
        return [tile for tile in found if tile]

    def _change(self, line: Line | None, metric: str | None) -> float | None:
        """How much better than the unedited model."""
        if not metric or not line or not self.base:
            return None
        ours, before = line.cells[metric].values[0], self.base.cells[metric].values[0]
        return None if ours is None or before is None else (ours - before) * (1 if self.higher[metric] else -1)

    def _tile(self, question: str, metric: str | None, among: Sequence[Line] | None = None, higher=None) -> Tile | None:
        higher = self.higher.get(metric, higher)
        rivals = [line for line in (self.lines if among is None else among) if self.competes(line, metric)]
        if not rivals or higher is None:
            return None
        best = (max if higher else min)(line.cells[metric].values[0] for line in rivals)
        winners = [line for line in rivals if line.cells[metric].values[0] == best]
        before = self.base.cells[metric].text if self.base and not metric.startswith("cost/") else ""
        return Tile(question, winners, metric, winners[0].cells[metric], before)

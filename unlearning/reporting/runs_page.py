"""A page about many runs: which method forgets most and harms least, and what do its images look like?

unlearn-report outputs
unlearn-report outputs/runs/sd14 --to sd14.html

The page is a single file without network; without its script it is a static page. Its numbers are those of the table.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

from unlearning.concepts import RETAIN
from unlearning.data import openmoji
from unlearning.errors import UserError
from unlearning.reporting.comparison import ARROWS, Comparison
from unlearning.reporting.formats import BEST, UNITS, Cell, meaning, quantity, render_page
from unlearning.reporting.grouping import Key, base_runs, competitors, concepts, conditions, group_runs, separating
from unlearning.reporting.page_images import SAMPLES, Sample, samples, thumbnail
from unlearning.reporting.plots import Course, Panel, Plot, Point, learning_curves
from unlearning.reporting.runs import UNEDITED, FinishedRun, by_purpose, purpose, read_runs
from unlearning.store.files import write_atomically

BEFORE = "the model before"
CONTROLS = (UNEDITED, "oracle")
IMAGES = 1000  # on a page, at most
COLUMNS = 8  # of images, besides the base model's
ALONG = 3  # values of a setting that make a curve, at least
SUCCESS, OTHER_RATES = "robustness/asr_", ("before_", "new_")  # prefixes of an attack's success rate and other rates
SAMPLED = 3  # concepts whose images stand beside the plot of all of them
SIDE, QUALITY = 160, 75  # pixels; WebP's scale: at 60 thin lines fray, 90 doubles the bytes without visible gain

# --- one table with its plot and its answers --------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """A row of the table.

    Attributes:
        label: Its name on the page: "uce, steps 20".
        coverage: "2 of 10 concepts", if it is a mean over fewer than other rows.
        n: The number of runs.
        cells: By metric.
    """

    key: Key
    label: str
    coverage: str
    n: Cell
    cells: Mapping[str, Cell]

    @property
    def method(self) -> str:
        """The method of the row."""
        return self.key[0]


@dataclass(frozen=True)
class Answer:
    """The best rows by a metric; `before` is the base model's number."""

    question: str
    lines: Sequence[Line]
    metric: str
    cell: Cell
    before: str


@dataclass(frozen=True)
class Scope:
    """The runs of one table: those of all concepts of a model and dataset (concept ""), or of one of them."""

    concept: str
    runs: Sequence[FinishedRun]
    by: Sequence[str]
    samples: list[Sample] = field(default_factory=list)

    @cached_property
    def comparison(self) -> Comparison:
        """The runs side by side."""
        return Comparison(self.runs, self.by)

    @cached_property
    def headers(self) -> dict[str, Cell]:
        """The header of each metric."""
        table = self.comparison.table
        return dict(zip(self.comparison.columns, table.header[table.labels + 1 :], strict=True))

    def purposes(self, *, cost: bool) -> dict[str, list[str]]:
        """The metrics by purpose: those of cost, or the others."""
        groups = by_purpose(self.comparison.columns)
        return {name: metrics for name, metrics in groups.items() if (name == "cost") == cost}

    @cached_property
    def lines(self) -> list[Line]:
        """The rows of the table."""
        table, lines = self.comparison.table, []
        for key, cells in zip(self.comparison.rows, table.lines, strict=True):
            numbers = dict(zip(self.comparison.columns, cells[table.labels + 1 :], strict=True))
            lines.append(Line(key, self._label(key), self._coverage(key), cells[table.labels], numbers))
        return lines

    def _label(self, key: Key) -> str:
        """The method, with those of its settings that vary, and the conditions in which it differs from most rows."""
        rows, by = self.comparison.rows, self.comparison.by
        same, shared, parts = [other for other in rows if other[0] == key[0]], conditions(by), [str(key[0])]
        for i, name in enumerate(by):
            usual = Counter(other[i] for other in rows).most_common(1)[0][0]
            if len({other[i] for other in same}) > 1 or (name in shared and key[i] != usual):
                parts.append(f"{name.rpartition('.')[2]} {key[i]}")
        return ", ".join(parts)

    def _coverage(self, key: Key) -> str:
        own, all_ = (len(concepts(runs)) for runs in (self.comparison.rows[key], self.runs))
        return f"{own} of {all_} concepts" if own < all_ else ""

    @cached_property
    def comparable(self) -> list[Key]:
        """The rows that the answers are about: those of most methods under the same conditions."""
        return max(competitors(self.comparison.rows, self.comparison.by), key=len)

    def value(self, line: Line | None, metric: str) -> float | None:
        """The number of a row; None if it was not measured."""
        row = self.comparison.columns[metric].means.get(line.key) if line else None
        return row.value if row else None

    def competes(self, line: Line, metric: str) -> bool:
        """Whether a row competes in a metric under the conditions of the answers."""
        column = self.comparison.columns.get(metric)
        return column is not None and line.key in self.comparable and line.key in column.competing

    @cached_property
    def higher(self) -> dict[str, bool]:
        """The directions of the metrics that have one."""
        directions = {metric: column.higher_is_better for metric, column in self.comparison.columns.items()}
        return {metric: higher for metric, higher in directions.items() if higher is not None}

    def first(self, *purposes: str) -> str | None:
        """The first metric with a direction, of the purposes in their order."""
        return next((metric for name in purposes for metric in self.higher if purpose(metric) == name), None)

    @cached_property
    def axes(self) -> tuple[str | None, str | None]:
        """The metrics of the plot: how much is forgotten, and how much is kept."""
        return self.first("efficacy", "robustness"), self.first("retention", "fidelity")

    @cached_property
    def base(self) -> Line | None:
        """The row of the unedited model."""
        unedited = [line for line in self.lines if line.method == UNEDITED]
        return next((line for line in unedited if line.key in self.comparable), next(iter(unedited), None))

    @cached_property
    def plot(self) -> Plot | None:
        """Efficacy against retention; None if one of them was not measured, or no row competes in both."""
        x, y = self.axes
        if not x or not y:
            return None
        points = []
        for line in self.lines:
            a, b = (self.comparison.columns[metric].means.get(line.key) for metric in (x, y))
            if a and b:
                competes = self.competes(line, x) and self.competes(line, y)
                label = BEFORE if line.method == UNEDITED else line.label
                points.append(Point(label, line.method, a.value, b.value, a.error or 0.0, b.error or 0.0, competes))
        if not any(point.competes for point in points):
            return None
        name_x, name_y = (metric.partition("/")[2] + ARROWS[self.higher[metric]] for metric in (x, y))
        return Plot.of(points, (name_x, name_y), (self.higher[x], self.higher[y]))

    @cached_property
    def attacks(self) -> dict[str, list[tuple[Line, Cell]]]:
        """Every row's success rate by attack, in percent; the controls come first."""
        names = [m.removeprefix(SUCCESS) for m in self.comparison.columns if m.startswith(SUCCESS)]
        lines = sorted(self.lines, key=lambda line: [*CONTROLS, line.method].index(line.method))
        return {
            name: [(line, cell) for line in lines if (cell := line.cells[SUCCESS + name]).values[0] is not None]
            for name in names
            if not name.startswith(OTHER_RATES)
        }

    @cached_property
    def courses(self) -> list[Course]:
        """The metrics of the plot along each numeric setting, for rows that differ in nothing else."""
        courses = []
        for i, setting in enumerate(self.comparison.by):
            for metric in filter(None, self.axes):
                curves: dict[Key, dict[float, float]] = {}
                for key, mean in self.comparison.columns[metric].means.items():
                    if isinstance(key[i], int | float) and not isinstance(key[i], bool):
                        curves.setdefault(key[:i] + key[i + 1 :], {})[float(key[i])] = mean.value
                if long := {_joined(rest): curve for rest, curve in curves.items() if len(curve) >= ALONG}:
                    courses.append(Course.of(setting, metric, long))
        return courses

    @cached_property
    def answers(self) -> list[Answer]:
        """The answers at the top of the page."""
        forgets, keeps = self.axes
        answers = [self._answer("forgets most", forgets), self._answer("best of both", self.first("summary"))]
        if self._gain(self.base, forgets) is None:
            answers.append(self._answer("harms least", keeps))
        else:
            competing = [line for line in self.lines if forgets and self.competes(line, forgets)]
            gains = [(self._gain(line, forgets) or 0.0, line) for line in competing]
            best = max((gain for gain, _ in gains), default=0.0)
            able = [line for gain, line in gains if best and gain >= best / 2]
            answers.append(self._answer("harms least of those that forget", keeps, able))
            answers.append(self._answer("cheapest of those that forget", "cost/seconds", able, higher=False))
        return [answer for answer in answers if answer]

    def _gain(self, line: Line | None, metric: str | None) -> float | None:
        """The improvement of a row over the unedited model."""
        if not metric:
            return None
        ours, before = self.value(line, metric), self.value(self.base, metric)
        return None if ours is None or before is None else (ours - before) * (1 if self.higher[metric] else -1)

    def _answer(
        self, question: str, metric: str | None, among: Sequence[Line] | None = None, higher: bool | None = None
    ) -> Answer | None:
        if not metric:
            return None
        higher = self.higher.get(metric) if higher is None else higher
        rows = [line for line in (self.lines if among is None else among) if self.competes(line, metric)]
        if not rows or higher is None:
            return None
        values = {line.key: value for line in rows if (value := self.value(line, metric)) is not None}
        best = (max if higher else min)(values.values())
        winners = [line for line in rows if values[line.key] == best]
        before = self.base.cells[metric].text if self.base and purpose(metric) != "cost" else ""
        return Answer(question, winners, metric, winners[0].cells[metric], before)


# --- all runs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """The runs of one model and dataset.

    Attributes:
        scopes: All concepts, if there are several, then each of them.
        panels: Learning curves.
        silent: The methods without learning curves.
        columns: The rows whose images are shown.
        explicit: Whether images may be explicit.
    """

    model: str
    dataset: str
    scopes: Sequence[Scope]
    panels: Sequence[Panel]
    silent: Sequence[str]
    columns: Sequence[Line]
    explicit: bool

    @property
    def samples(self) -> list[Sample]:
        """Some of each kind, beside the plot of all concepts."""
        single = [scope.samples for scope in self.scopes if scope.concept and scope.samples]
        kept = [sample for own in single for sample in own if sample.role == RETAIN]
        other = [sample for own in single for sample in own if sample.role not in SAMPLES]
        return [*(own[0] for own in single[:SAMPLED]), *kept[:1], *other[:1]]


def _worlds(runs: Sequence[FinishedRun]) -> Iterator[World]:
    groups = group_runs(runs, ("model", "dataset"))
    total = sum(len(concepts(group)) for group in groups.values())
    for (model, dataset), group in groups.items():
        by = separating(group, ("method",))
        parts = list(group_runs(group, ("concept",)).values())
        whole = Scope("", [*group, *base_runs(group, by)], by)
        columns = _columns(whole)
        count = max(1, IMAGES // (total * (1 + len(columns))))
        room = IMAGES // (1 + len(columns)) // len(groups)  # concepts that have images
        scopes = [whole] if len(parts) > 1 else []
        for i, part in enumerate(parts):
            rows = group_runs(part, by)
            shown = {line.key: rows[line.key] for line in columns if line.key in rows}
            shown_images = samples(shown, count if i < room else 0)
            scopes.append(Scope(part[0].concept, [*part, *base_runs(part, by)], by, shown_images))
        explicit = any("nudenet" in name for run in group for name in run.metrics)
        yield World(str(model), str(dataset), scopes, *learning_curves(group), columns, explicit)


def _columns(scope: Scope) -> list[Line]:
    """The rows whose images are shown: those of the Pareto front have precedence; in the order of the table."""
    edited = [line for line in scope.lines if line.method != UNEDITED]
    front = {point.label for point in scope.plot.front} if scope.plot else set()
    chosen = sorted(edited, key=lambda line: line.label not in front)[:COLUMNS]
    return [line for line in edited if line in chosen]


def _quantity(metric: str, cell: Cell) -> str:
    """The text of a cell; a cost with its unit."""
    mean, error = cell.values[:2]
    if not isinstance(mean, float | int) or metric not in UNITS:
        return cell.text
    return quantity(metric, mean, error if isinstance(error, float) else 0.0)


def _joined(key: Key) -> str:
    """The values that a row has, as a name."""
    return ", ".join(str(value) for value in key if value is not None)


def _hues(methods: Iterable[str]) -> dict[str, int]:
    """A hue for each; neighbours are far apart."""
    return {method: (255 + round(i * 137.508)) % 360 for i, method in enumerate(methods)}


def _title(methods: Sequence[str], concepts: Sequence[str]) -> str:
    edited = [method for method in methods if method != UNEDITED]
    what = concepts[0] if len(concepts) == 1 else f"{len(concepts)} concepts"
    how = f"by {edited[0]}" if len(edited) == 1 else f"by {len(edited)} methods"
    return f"{what}, erased {how}" if edited else f"{what}, nothing erased"


def page(folder: Path, to: Path | None = None) -> Path:
    """Writes a page about all finished runs under `folder` to `to`, by default report.html in it. Returns its path.

    Raises UserError if there are no runs, or the folder is itself a run.
    """
    folder = Path(folder)
    to = Path(to) if to else folder / "report.html"
    runs = read_runs(folder)
    if runs[0].folder == folder:
        raise UserError(f"{folder} is a run, and report.html its own page. Name a folder above it.")
    worlds = list(_worlds(runs))
    used = dict.fromkeys(line.method for world in worlds for scope in world.scopes for line in scope.lines)
    methods = sorted(used, key=lambda method: (method != UNEDITED, str(method)))
    values = {name: list(dict.fromkeys(str(run[name]) for run in runs)) for name in ("model", "dataset", "concept")}
    text = render_page(
        "runs_page.html.j2",
        title=_title(methods, values["concept"]),
        worlds=worlds,
        runs=runs,
        methods=methods,
        hues=_hues(m for m in methods if m != UNEDITED),
        hues_of=_hues,
        controls=CONTROLS,
        seeds=len({run["seed"] for run in runs}),
        values=values,
        image=cache(lambda path: thumbnail(path, SIDE, "webp", quality=QUALITY)),  # some are shown twice
        quantity=_quantity,
        meaning=meaning,
        best=BEST,
        unedited=UNEDITED,
        before=BEFORE,
        licence=openmoji.LICENCE if any(model.startswith("emoji") for model in values["model"]) else "",
    )
    to.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(to, text)
    return to


def main() -> None:
    """The console command unlearn-report."""
    parser = argparse.ArgumentParser(prog="unlearn-report", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="runs at any depth below it")
    parser.add_argument("--to", type=Path, help="the file of the page; by default report.html in the folder")
    try:
        print(page(**vars(parser.parse_args())))
    except UserError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()

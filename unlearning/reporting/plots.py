"""Coordinates of plots that a page draws as SVG: efficacy against retention, a metric along a setting, learning curves.

In the first plot, each row of a table is a point. Axes are oriented so that the best is at the upper right.
Coordinates are percent of the plot from the lower left corner, so that they fit a page of any width.
"""

import csv
import logging
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import floor, log10
from pathlib import Path
from statistics import mean

from unlearning.reporting.runs import PURPOSES, FinishedRun, purpose

log = logging.getLogger(__name__)

# --- efficacy against retention ---------------------------------------------------------------------------------------

WIDTH, HEIGHT, LETTER, LINE = 420, 380, 7.2, 17  # size in pixels for which labels are placed; a page may be wider
MARGIN = 5  # percent on every side
LABELLED = 14  # with more points than these, only those on the front have labels
# Positions of a label, in order of preference: the anchor of its text, and its offset from the point in pixels.
BESIDE = (("end", -11, 0), ("start", 11, 0), ("middle", 0, -15), ("middle", 0, 15))
FARTHER = tuple(
    (anchor, way * (9 + 2 * step), dy * step)
    for step in range(1, 11)
    for dy in (-15, 15)
    for anchor, way in (("end", -1), ("start", 1))
)


@dataclass(frozen=True)
class Point:
    """Two means of a row with their standard errors, and whether the row competes in both."""

    label: str
    method: str
    x: float
    y: float
    x_error: float = 0.0
    y_error: float = 0.0
    competes: bool = True


@dataclass(frozen=True)
class Axis:
    """One metric: its name, the range that is shown, and its direction."""

    name: str
    low: float
    high: float
    higher_is_better: bool

    @classmethod
    def over(cls, name: str, values: Iterable[tuple[float, float]], higher_is_better: bool) -> "Axis":
        """An axis that holds every (mean, standard error)."""
        values = list(values)
        low, high = min(v - e for v, e in values), max(v + e for v, e in values)
        room = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
        return cls(name, low - room, high + room, higher_is_better)

    def at(self, value: float) -> float:
        """The place of a value in percent; better is further."""
        share = (value - self.low) / (self.high - self.low)
        return MARGIN + (100 - 2 * MARGIN) * (share if self.higher_is_better else 1 - share)

    @cached_property
    def ticks(self) -> list[tuple[str, float]]:
        """Round values and their places."""
        rough = (self.high - self.low) / 5
        power = 10.0 ** floor(log10(rough))
        step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough)
        places = max(0, -floor(log10(step)))
        values = [i * step for i in range(-floor(-self.low / step), floor(self.high / step) + 1)]
        return [(f"{value:,.{places}f}".replace("-", "−"), self.at(value)) for value in values]


@dataclass(frozen=True)
class Plot:
    """Points in the plane of two metrics, and which of them no other beats."""

    x: Axis
    y: Axis
    points: Sequence[Point]

    @classmethod
    def of(cls, points: Sequence[Point], names: tuple[str, str], higher_is_better: tuple[bool, bool]) -> "Plot":
        """A plot with axes that hold all points."""
        x = Axis.over(names[0], ((p.x, p.x_error) for p in points), higher_is_better[0])
        y = Axis.over(names[1], ((p.y, p.y_error) for p in points), higher_is_better[1])
        return cls(x, y, points)

    def at(self, point: Point) -> tuple[float, float]:
        """The coordinates of a point in percent."""
        return self.x.at(point.x), self.y.at(point.y)

    @cached_property
    def front(self) -> list[Point]:
        """The Pareto front: the points that no other beats in one direction without losing in the other."""
        places = {point: self.at(point) for point in self.points if point.competes}

        def beaten(point: Point) -> bool:
            here = places[point]
            return any(there != here and there[0] >= here[0] and there[1] >= here[1] for there in places.values())

        return sorted((point for point in places if not beaten(point)), key=places.__getitem__)

    @cached_property
    def steps(self) -> list[tuple[float, float]]:
        """The front as the corners of a staircase, from the left edge to the lower edge."""
        corners = [self.at(point) for point in self.front]
        if not corners:
            return []
        inner = [corner for a, b in pairwise(corners) for corner in (a, (a[0], b[1]))]
        return [(0.0, corners[0][1]), *inner, corners[-1], (corners[-1][0], 0.0)]

    @cached_property
    def labels(self) -> list[tuple[Point, str, float, float]]:
        """(point, anchor, dx, dy) with offsets in pixels, such that labels cover neither points nor each other."""
        shown = [p for p in self.points if len(self.points) <= LABELLED or p in self.front or not p.competes]
        taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in map(self._pixels, self.points)]
        placed: list[tuple[Point, str, float, float]] = []
        for point in shown:
            x, y = self._pixels(point)
            width = len(point.label) * LETTER
            boxes = {side: _rectangle(x + side[1], y + side[2], width, side[0]) for side in BESIDE + FARTHER}
            inside = [side for side, box in boxes.items() if _inside(box)] or [*boxes]
            free = (side for side in inside if not any(_overlap(boxes[side], box) for box in taken))
            side = next(free, inside[0])
            taken.append(boxes[side])
            placed.append((point, side[0], side[1], side[2]))
        return placed

    @cached_property
    def leaders(self) -> list[tuple[Point, float, float]]:
        """Lines to the labels that are more than a line of text away from their points: (point, dx, dy)."""
        return [(point, dx, dy) for point, _, dx, dy in self.labels if abs(dy) > LINE]

    def _pixels(self, point: Point) -> tuple[float, float]:
        x, y = self.at(point)
        return x / 100 * WIDTH, (1 - y / 100) * HEIGHT


Rectangle = tuple[float, float, float, float]  # left, top, right, bottom in pixels


def _rectangle(x: float, y: float, width: float, anchor: str) -> Rectangle:
    left = {"start": x, "middle": x - width / 2, "end": x - width}[anchor]
    return left, y - LINE / 2, left + width, y + LINE / 2


def _inside(box: Rectangle) -> bool:
    return box[0] >= 0 and box[1] >= 0 and box[2] <= WIDTH and box[3] <= HEIGHT


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


# --- a metric along a setting -----------------------------------------------------------------------------------------

SPREAD = 10  # the axis is logarithmic if the largest value is at least so many times the smallest


@dataclass(frozen=True)
class Course:
    """A metric along a numeric setting. `curves` are by name: (value, mean, x, y) with x and y percent, y downwards."""

    setting: str
    metric: str
    curves: dict[str, list[tuple[float, float, float, float]]]
    low: float
    high: float

    @classmethod
    def of(cls, setting: str, metric: str, curves: dict[str, dict[float, float]]) -> "Course":
        """A plot of curves by name, each with the mean for each value of the setting."""
        values = sorted({value for curve in curves.values() for value in curve})
        means = [mean for curve in curves.values() for mean in curve.values()]
        low, high = min(means), max(means)
        logarithmic = values[0] > 0 and values[-1] >= SPREAD * values[0]
        scale = log10 if logarithmic else float
        first, last = scale(values[0]), scale(values[-1])

        def placed(curve: dict[float, float]) -> list[tuple[float, float, float, float]]:
            return [
                (
                    value,
                    mean,
                    100 * (scale(value) - first) / (last - first),
                    100 * (high - mean) / ((high - low) or 1.0),
                )
                for value, mean in sorted(curve.items())
            ]

        return cls(setting, metric, {name: placed(curve) for name, curve in curves.items()}, low, high)

    @property
    def values(self) -> list[float]:
        """All values of the setting."""
        return sorted({value for curve in self.curves.values() for value, *_ in curve})


# --- learning curves --------------------------------------------------------------------------------------------------

CURVES, POINTS = 24, 60  # of a panel at most, and of a curve; a point is the mean of several steps


@dataclass(frozen=True)
class Panel:
    """One logged quantity of one method. `curves` are (concept, SVG points): x and y from 0 to 100, y downwards."""

    method: str
    name: str
    curves: Sequence[tuple[str, str]]
    low: float
    high: float
    steps: int
    runs: int


def learning_curves(runs: Sequence[FinishedRun]) -> tuple[list[Panel], list[str]]:
    """A panel for each method and logged quantity, and the methods whose runs logged nothing."""
    methods: dict[str, list[FinishedRun]] = {}
    for run in runs:
        methods.setdefault(str(run["method"]), []).append(run)
    panels, silent = [], []
    for method, group in methods.items():
        count = min(CURVES, len(group))
        logs = [(run, logged(run.folder)) for run in (group[k * len(group) // count] for k in range(count))]
        names = dict.fromkeys(name for _, log in logs for name in log)
        silent += [] if names else [method]
        for name in names:
            curves = [(run.concept, log[name]) for run, log in logs if name in log]
            panels.append(_panel(method, name, curves, len(group)))
    return panels, silent


def logged(run: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of all that the CSV logger wrote more than once, by name; without the metrics of the evaluation."""
    curves: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(run.glob("logs/csv/version_*/metrics.csv"), key=lambda p: (len(p.parent.name), p.parent.name)):
        for line in _lines(path):
            for name in (name for name in line if name and purpose(name) not in (*PURPOSES, "base", "epoch", "step")):
                with suppress(KeyError, TypeError, ValueError):  # an empty cell
                    curves.setdefault(name, []).append((int(line["step"]), float(line[name])))
    return {name: sorted(values) for name, values in curves.items() if len(values) > 1}


def _lines(path: Path) -> list[dict]:
    """The lines of a CSV; none of a damaged one, with a warning."""
    try:
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    except (ValueError, csv.Error) as error:
        log.warning("%s is damaged (%s): its curves are left out.", path, error)
        return []


def _panel(method: str, name: str, curves: Sequence[tuple[str, Sequence[tuple[int, float]]]], runs: int) -> Panel:
    last = max(step for _, curve in curves for step, _ in curve)
    means = [(concept, _binned(curve)) for concept, curve in curves]
    values = [value for _, curve in means for _, value in curve if value == value]
    low, high = min(values, default=0.0), max(values, default=1.0)

    def line(curve: Sequence[tuple[float, float]]) -> str:
        height = (high - low) or 1.0
        return " ".join(f"{100 * x / (last or 1):.1f},{100 * (high - y) / height:.1f}" for x, y in curve if y == y)

    return Panel(method, name, [(concept, line(curve)) for concept, curve in means], low, high, last + 1, runs)


def _binned(values: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    size = -(-len(values) // POINTS)
    return [tuple(map(mean, zip(*values[i : i + size], strict=True))) for i in range(0, len(values), size)]

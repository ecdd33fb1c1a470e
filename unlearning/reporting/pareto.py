"""Efficacy against retention: every row of a table as a point, and the front that none of them passes.

The best corner is up and to the right, whichever way the metrics count. Coordinates are percent of the plot, from its
lower left corner, so that a page of any width can draw them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import floor, log10

WIDTH, HEIGHT, LETTER, LINE = 420, 380, 7.2, 17  # pixels: what labels are placed for; a page may be wider
MARGIN = 5  # percent on every side
LABELLED = 14  # beyond so many points, those on the front are labelled and no others
# where a name may stand: the anchor of its text, and how many pixels off its point; tried in this order
BESIDE = (("end", -11, 0), ("start", 11, 0), ("middle", 0, -15), ("middle", 0, 15))
FARTHER = tuple(
    (anchor, way * (9 + 2 * step), dy * step)
    for step in range(1, 11)
    for dy in (-15, 15)
    for anchor, way in (("end", -1), ("start", 1))
)


@dataclass(frozen=True)
class Point:
    """A row's two means with their standard errors.

    The unedited model does not compete, nor do strange protocols and means over other concepts.
    """

    label: str
    method: str
    x: float
    y: float
    x_error: float = 0.0
    y_error: float = 0.0
    competes: bool = True


@dataclass(frozen=True)
class Axis:
    """One metric: its name, the range to be shown, and whether higher is better."""

    name: str
    low: float
    high: float
    higher: bool

    @classmethod
    def over(cls, name: str, values: Iterable[tuple[float, float]], higher: bool) -> "Axis":
        """An axis that holds every (mean, standard error)."""
        values = list(values)
        low, high = min(v - e for v, e in values), max(v + e for v, e in values)
        room = (high - low) * 0.04 or abs(high) * 0.1 or 1.0
        return cls(name, low - room, high + room, higher)

    def at(self, value: float) -> float:
        """Percent along the axis, better being further."""
        share = (value - self.low) / (self.high - self.low)
        return MARGIN + (100 - 2 * MARGIN) * (share if self.higher else 1 - share)

    @cached_property
    def ticks(self) -> list[tuple[str, float]]:
        """Round values and where they stand."""
        rough = (self.high - self.low) / 5
        power = 10.0 ** floor(log10(rough))
        step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough)
        first = -floor(-self.low / step)
        places = max(0, -floor(log10(step)))
        values = [i * step for i in range(first, floor(self.high / step) + 1)]
        return [(f"{value:,.{places}f}".replace("-", "−"), self.at(value)) for value in values]


@dataclass(frozen=True)
class Plot:
    x: Axis
    y: Axis
    points: Sequence[Point]

    @classmethod
    def of(cls, points: Sequence[Point], x: str, y: str, higher: tuple[bool, bool]) -> "Plot":
        return cls(
            Axis.over(x, ((p.x, p.x_error) for p in points), higher[0]),
            Axis.over(y, ((p.y, p.y_error) for p in points), higher[1]),
            points,
        )

    def at(self, point: Point) -> tuple[float, float]:
        return self.x.at(point.x), self.y.at(point.y)

    @cached_property
    def front(self) -> list[Point]:
        """The points that no other passes in one direction without falling behind in the other; from left to right."""
        rivals = {point: self.at(point) for point in self.points if point.competes}

        def beaten(point: Point) -> bool:
            here = rivals[point]
            return any(there != here and there[0] >= here[0] and there[1] >= here[1] for there in rivals.values())

        return sorted((point for point in rivals if not beaten(point)), key=rivals.__getitem__)

    @cached_property
    def steps(self) -> list[tuple[float, float]]:
        """The front as the corners of a staircase, from the left edge to the lower one."""
        corners = [self.at(point) for point in self.front]
        if not corners:
            return []
        inner = [corner for a, b in pairwise(corners) for corner in (a, (a[0], b[1]))]
        return [(0.0, corners[0][1]), *inner, corners[-1], (corners[-1][0], 0.0)]

    @cached_property
    def labels(self) -> list[tuple[Point, str, float, float]]:
        """What is written where: (point, anchor, dx, dy), the offsets in pixels; of many points, those of the front."""
        shown = [p for p in self.points if len(self.points) <= LABELLED or p in self.front or not p.competes]
        taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in map(self._pixels, self.points)]
        placed = []
        for point in shown:
            x, y = self._pixels(point)
            width = len(point.label) * LETTER
            boxes = {side: _box(x + side[1], y + side[2], width, side[0]) for side in BESIDE + FARTHER}
            free = [side for side, box in boxes.items() if _inside(box) and not any(_overlap(box, t) for t in taken)]
            side = (free or [s for s in boxes if _inside(boxes[s])] or [*boxes])[0]
            taken.append(boxes[side])
            placed.append((point, *side))
        return placed

    @cached_property
    def leaders(self) -> list[tuple[Point, float, float]]:
        """Lines to the labels that stand more than a line of text off their points: (point, dx, dy)."""
        return [(point, dx, dy) for point, _, dx, dy in self.labels if abs(dy) > LINE]

    def _pixels(self, point: Point) -> tuple[float, float]:
        x, y = self.at(point)
        return x / 100 * WIDTH, (1 - y / 100) * HEIGHT


Box = tuple[float, float, float, float]  # left, top, right, bottom


def _box(x: float, y: float, width: float, anchor: str) -> Box:
    left = {"start": x, "middle": x - width / 2, "end": x - width}[anchor]
    return left, y - LINE / 2, left + width, y + LINE / 2


def _inside(box: Box) -> bool:
    return box[0] >= 0 and box[1] >= 0 and box[2] <= WIDTH and box[3] <= HEIGHT


def _overlap(a: Box, b: Box) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]

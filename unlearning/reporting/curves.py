"""Learning curves, from what the CSV logger kept of a run: logs/csv/version_*/metrics.csv."""

import csv
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from unlearning.reporting.rows import measured

RUNS, BINS = 24, 60  # lines in a panel, and points of a line; each point is the mean of the steps that it stands for
COUNTERS = ("epoch", "step")


@dataclass(frozen=True)
class Panel:
    """One logged quantity of one method's runs. `lines` are SVG points by run: x and y from 0 to 100, y downwards."""

    method: str
    name: str
    lines: Sequence[tuple[str, int, str]]  # concept, seed, points
    low: float
    high: float
    steps: int
    runs: int


def logged(run: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of everything a run logged more than once, by name; what it was finally measured by is left out."""
    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted(run.glob("logs/csv/version_*/metrics.csv"), key=lambda p: (len(p.parent.name), p.parent.name)):
        with path.open(newline="") as file:
            lines = csv.DictReader(file)
            names = [name for name in lines.fieldnames or () if name not in COUNTERS]
            final = {*measured(name.removeprefix("base/") for name in names)}
            names = [name for name in names if name.removeprefix("base/") not in final]
            for line in lines:
                for name in names:
                    with suppress(TypeError, ValueError):  # an empty cell
                        found.setdefault(name, []).append((int(line["step"]), float(line[name])))
    return {name: sorted(values) for name, values in found.items() if len(values) > 1}


def _binned(values: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    size = -(-len(values) // BINS)
    return [tuple(map(mean, zip(*values[i : i + size], strict=True))) for i in range(0, len(values), size)]


def panels(runs: Sequence[Mapping]) -> tuple[list[Panel], list[str]]:
    """The curves of the runs, a panel a method and quantity; and the methods that left none."""
    methods: dict[str, list[Mapping]] = {}
    for run in runs:
        methods.setdefault(str(run.get("method")), []).append(run)
    found, silent = [], []
    for method, group in methods.items():
        count = min(RUNS, len(group))
        drawn = {i: logged(group[i]["run"]) for i in (k * len(group) // count for k in range(count))}
        names = dict.fromkeys(name for curves in drawn.values() for name in curves)
        silent += [] if names else [method]
        found += [_panel(method, name, {i: c[name] for i, c in drawn.items() if name in c}, group) for name in names]
    return found, silent


def _panel(method: str, name: str, curves: Mapping[int, Sequence], group: Sequence[Mapping]) -> Panel:
    binned = {i: _binned(curve) for i, curve in curves.items()}
    values = [value for curve in binned.values() for _, value in curve if value == value]
    low, high = min(values, default=0.0), max(values, default=1.0)
    last = max(step for curve in curves.values() for step, _ in curve)

    def line(curve: Sequence[tuple[float, float]]) -> str:
        height = (high - low) or 1.0
        return " ".join(f"{100 * x / (last or 1):.1f},{100 * (high - y) / height:.1f}" for x, y in curve if y == y)

    lines = [(str(group[i].get("concept")), group[i]["seed"], line(curve)) for i, curve in binned.items()]
    return Panel(method, name, lines, low, high, last + 1, len(group))

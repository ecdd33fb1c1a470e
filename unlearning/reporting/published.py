"""A paper's numbers, from a CSV: method, concept, metric, value, source; and of which model, by which protocol."""

import csv
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path

from unlearning.errors import UserError
from unlearning.reporting.sheet import listed

COLUMNS = ("method", "concept", "metric", "value", "source")
OPTIONAL = ("model", "protocol")
AVERAGE = "average"  # the concept of a number that is a mean over a paper's concepts


@dataclass(frozen=True)
class Number:
    """A published value in the unit of our metric, and where it stands: paper, table, how it was measured.

    Args:
        model: What it was measured on, by the name that it has in conf/model; "" where nobody said.
        protocol: What our metric's protocol has to say for the two to be comparable, in parts: "score >= 0.6; counting
            boxes". "" where nobody said.
        over: The concepts that it is a mean over, as far as its file names them; None of a single concept's.
    """

    value: float
    source: str
    model: str = ""
    protocol: str = ""
    over: tuple[str, ...] | None = None

    def unlike(self, models: Sequence[str], protocols: Sequence[str], concepts: Collection[str] = ()) -> str:
        """Why it is not known to be comparable to what was measured on `models` by `protocols`; "" where it is.

        A mean is held against one over the same `concepts`.
        """
        why = []
        if not self.model:
            why.append("published without naming the model")
        elif {*models} != {self.model}:
            why.append(f"published of {self.model}, measured on {', '.join(models)}")
        if not self.protocol:
            why.append("published without a protocol to hold ours against")
        elif not all(part.strip() in ours for part in self.protocol.split(";") for ours in protocols):
            why.append(f"published by another protocol ({self.protocol})")
        if self.over == ():
            why.append("published as an average without naming its concepts")
        elif self.over is not None and {*self.over} != {*concepts}:
            theirs, ours = (listed(sorted(names)) for names in (self.over, concepts))
            why.append(f"published as an average over {theirs}, measured over {ours}")
        return "; ".join(why)


def published(path: Path) -> dict[tuple[str, str, str], Number]:
    """A paper's numbers by (method, concept, metric), of a CSV with the columns method, concept, metric, value, source.

    It may have the columns model and protocol, see `Number`. Raises UserError where there is no such file, it lacks a
    column, a value is no number, or a number is there twice.
    """
    found: dict[tuple[str, str, str], Number] = {}
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            lines = csv.DictReader(file)
            for missing in (name for name in COLUMNS if name not in (lines.fieldnames or ())):
                raise UserError(f"{path} has no column {missing!r}; it needs {', '.join(COLUMNS)}.")
            for line in lines:
                key = (line["method"], line["concept"], line["metric"])
                if key in found:
                    raise UserError(f"{path}, line {lines.line_num}: {', '.join(key)} is there already.")
                value = _number(line["value"], f"{path}, line {lines.line_num}")
                found[key] = Number(value, line["source"] or "", *((line.get(name) or "").strip() for name in OPTIONAL))
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    return {key: replace(number, over=_over(found, key)) for key, number in found.items()}


def _over(numbers: Mapping[tuple[str, str, str], Number], key: tuple[str, str, str]) -> tuple[str, ...] | None:
    """What an average is over, for all that is known: every concept that has the metric too; None of what is none."""
    _, concept, metric = key
    named = dict.fromkeys(c for _, c, m in numbers if m == metric and c != AVERAGE)
    return tuple(named) if concept == AVERAGE else None


def _number(text: str | None, place: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = float("nan")
    if not isfinite(value):
        raise UserError(f"{place}: the value {text!r} is no number. Leave out what was not published.")
    return value


def beside(
    numbers: Mapping[tuple[str, str, str], Number], by: Sequence[str], key: Sequence, metric: str
) -> Number | None:
    """The number to hold against the metric of the row `key`, whose values are those of the settings `by`.

    A row that does not tell concepts apart is held against the paper's average, or the only concept that it has.
    """
    asked = dict(zip(by, key, strict=True))
    method = asked.get("method")
    if "concept" in asked:
        return numbers.get((method, asked["concept"], metric))
    concepts = {c: number for (m, c, name), number in numbers.items() if (m, name) == (method, metric)}
    return concepts.get(AVERAGE) or (next(iter(concepts.values())) if len(concepts) == 1 else None)

"""Numbers of papers, from a CSV file: method, concept, metric, value, source and optionally model and protocol."""

import csv
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path

from unlearning.errors import UserError
from unlearning.reporting.formats import listed

COLUMNS = ("method", "concept", "metric", "value", "source")
OPTIONAL = ("model", "protocol")
AVERAGE = "average"  # the concept of a number that is a mean over a paper's concepts


@dataclass(frozen=True)
class Number:
    """A published value, in the unit of our metric.

    Attributes:
        source: Paper and table.
        model: The model that it was measured on, by its name in conf/model; "" if the file does not say.
        protocol: What our protocol has to contain for the two to be comparable, in parts: "score >= 0.6; counting
            boxes". "" if the file does not say.
        over: The concepts of an average, those for which the file has the metric; None for a single concept.
    """

    value: float
    source: str
    model: str = ""
    protocol: str = ""
    over: tuple[str, ...] | None = None

    def difference(self, models: Sequence[str], protocols: Sequence[str], concepts: Collection[str] = ()) -> str:
        """Why the number is not, or may not be, comparable with ours; "" if it is.

        Args:
            models, protocols: The models and the protocols of our number.
            concepts: The concepts of our mean. An average is comparable only over the same concepts.
        """
        why = []
        if not self.model:
            why.append("published without naming the model")
        elif {*models} != {self.model}:
            why.append(f"published for {self.model}, measured on {', '.join(models)}")
        if not self.protocol:
            why.append("published without a protocol to compare")
        elif not all(part.strip() in ours for part in self.protocol.split(";") for ours in protocols):
            why.append(f"published by another protocol ({self.protocol})")
        if self.over == ():
            why.append("published as an average without naming its concepts")
        elif self.over is not None and {*self.over} != {*concepts}:
            theirs, ours = (listed(sorted(names)) for names in (self.over, concepts))
            why.append(f"published as an average over {theirs}, measured over {ours}")
        return "; ".join(why)


Published = Mapping[tuple[str, str, str], Number]  # by method, concept and metric


def read_published(path: Path) -> Published:
    """The numbers of a CSV file with the columns COLUMNS, and possibly OPTIONAL, see `Number`.

    Raises UserError if there is no such file, a column is missing, a value is no finite number, or a number is there
    twice.
    """
    numbers: dict[tuple[str, str, str], Number] = {}
    try:
        with Path(path).open(newline="", encoding="utf-8") as file:
            lines = csv.DictReader(file)
            for missing in (name for name in COLUMNS if name not in (lines.fieldnames or ())):
                raise UserError(f"{path} has no column {missing!r}; it needs {', '.join(COLUMNS)}.")
            for line in lines:
                key, place = (line["method"], line["concept"], line["metric"]), f"{path}, line {lines.line_num}"
                if key in numbers:
                    raise UserError(f"{place}: there is already a number for {', '.join(key)}.")
                model, protocol = ((line.get(name) or "").strip() for name in OPTIONAL)
                numbers[key] = Number(_number(line["value"], place), line["source"] or "", model, protocol)
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as CSV in UTF-8: {error}.") from None
    concepts: dict[str, dict[str, None]] = {}
    for _, concept, metric in numbers:
        if concept != AVERAGE:
            concepts.setdefault(metric, {})[concept] = None
    averages = {key: tuple(concepts.get(key[2], ())) for key in numbers if key[1] == AVERAGE}
    return {key: replace(number, over=averages.get(key)) for key, number in numbers.items()}


def _number(text: str | None, place: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = float("nan")
    if not isfinite(value):
        raise UserError(f"{place}: the value {text!r} is no number. Leave out what was not published.")
    return value


def published_number(numbers: Published, settings: Mapping[str, object], metric: str) -> Number | None:
    """The number to compare with a row of these settings.

    Without a concept among the settings, it is the paper's average, or the number of its only concept.
    """
    if "concept" in settings:
        return numbers.get((str(settings.get("method")), str(settings["concept"]), metric))
    method = settings.get("method")
    by_concept = {c: number for (m, c, name), number in numbers.items() if (m, name) == (method, metric)}
    return by_concept.get(AVERAGE) or (next(iter(by_concept.values())) if len(by_concept) == 1 else None)

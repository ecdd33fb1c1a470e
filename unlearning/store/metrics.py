"""metrics.json: a record per metric in memory, flat keys on disk.

On disk a metric `efficacy/acc_e` is up to five keys, so that any reader can use them without this package:

    "efficacy/acc_e": 5.0                      the value
    "efficacy/acc_e/protocol": "argmax of ..." how it was measured
    "efficacy/acc_e/better": "lower"           which direction is better
    "base/efficacy/acc_e": 100.0               the value of the unedited model
    "base/efficacy/acc_e/protocol": "..."      how that was measured
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from unlearning.errors import UserError
from unlearning.store.files import write_atomically

Flat = dict[str, float | str]


@dataclass(frozen=True)
class Metric:
    """One number and what it means.

    Attributes:
        value: The number of the erased model; None if only the unedited model has it.
        protocol: All that the number depends on besides the images, in one line.
        higher_is_better: Direction of improvement; None if the metric has none.
        base: The number of the unedited model, if it was measured.
        base_protocol: The protocol of `base`.
    """

    value: float | None
    protocol: str = ""
    higher_is_better: bool | None = None
    base: float | None = None
    base_protocol: str = ""

    @property
    def change(self) -> float | None:
        """The erased model's number minus the unedited model's; None if one of them was not measured."""
        return None if self.value is None or self.base is None else self.value - self.base

    @property
    def improved(self) -> bool | None:
        """Whether the change is for the better; None if there is no change or no direction."""
        return (self.change > 0) == self.higher_is_better if self.change and self.higher_is_better is not None else None

    def of_base(self) -> "Metric":
        """The metric of the unedited model, as its own value."""
        return Metric(self.base, self.base_protocol, self.higher_is_better)


def flat(metrics: Mapping[str, Metric]) -> Flat:
    """The keys of metrics.json, in the order of `metrics`; those of the unedited model come last."""
    keys: Flat = {}
    for name, metric in metrics.items():
        if metric.value is not None:
            keys[name] = metric.value
            if metric.protocol:
                keys[f"{name}/protocol"] = metric.protocol
        if metric.higher_is_better is not None:
            keys[f"{name}/better"] = "higher" if metric.higher_is_better else "lower"
    for name, metric in metrics.items():
        if metric.base is not None:
            keys[f"base/{name}"] = metric.base
            if metric.base_protocol:
                keys[f"base/{name}/protocol"] = metric.base_protocol
    return keys


def records(keys: Mapping[str, float | str]) -> dict[str, Metric]:
    """The inverse of `flat`. Values that are no finite number are left out."""
    names = [key.removeprefix("base/") for key, value in keys.items() if _is_number(value)]
    return {name: _record(keys, name) for name in dict.fromkeys(names)}


def _record(keys: Mapping[str, float | str], name: str) -> Metric:
    better = keys.get(f"{name}/better")
    return Metric(
        value=_number(keys.get(name)),
        protocol=str(keys.get(f"{name}/protocol", "")),
        higher_is_better=None if better not in ("higher", "lower") else better == "higher",
        base=_number(keys.get(f"base/{name}")),
        base_protocol=str(keys.get(f"base/{name}/protocol", "")),
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _number(value: object) -> float | None:
    return value if _is_number(value) else None  # type: ignore[return-value]


def read(path: Path) -> dict[str, Metric]:
    """The metrics of a metrics.json. Raises UserError if the file is missing, damaged or empty."""
    again = "run the evaluate stage of this run."
    try:
        keys = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"There is no {path} yet: {again}") from None
    except ValueError as error:  # no JSON, or no text
        raise UserError(f"{path} is damaged ({error}): {again}") from None
    if not isinstance(keys, dict) or not keys:
        raise UserError(f"{path} holds no metrics: {again}")
    return records(keys)


def write(path: Path, metrics: Mapping[str, Metric]) -> None:
    """Writes metrics.json, whole or not at all."""
    write_atomically(path, json.dumps(flat(metrics), indent=2, allow_nan=False))

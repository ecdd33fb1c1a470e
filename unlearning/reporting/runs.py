"""Finished runs, read from disk: the settings and the metrics of each, without the code that made them."""

import logging
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from unlearning.errors import UserError
from unlearning.store import metrics as store
from unlearning.store.metrics import Metric

PURPOSES = ("summary", "efficacy", "retention", "fidelity", "robustness", "cost")  # in the order of every table
UNEDITED = "none"  # the method that erases nothing
DRAWINGS = ("base", "erased")  # the manifests that every run has, in the order in which they are shown

log = logging.getLogger(__name__)
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # seconds for thousands of runs; OmegaConf takes minutes


@dataclass(frozen=True)
class FinishedRun:
    """A finished run, as read from its folder.

    Attributes:
        folder: The folder of the run.
        settings: By dotted name ("sampler.steps"), and by Hydra group the chosen file ("method": "esd_x"). A list is
            joined ("cat+dog"). Paths below the run's own `paths` begin with the name of that setting ("{weights}/x"),
            so that they agree between machines; `after` is not a path but what was erased before ("cat by uce").
        metrics: By name ("efficacy/acc_e").
    """

    folder: Path
    settings: Mapping[str, object]
    metrics: Mapping[str, Metric]

    def __getitem__(self, setting: str) -> object:
        """The value of a setting; None if the run does not have it."""
        return self.settings.get(setting)

    @property
    def concept(self) -> str:
        """The erased concept, or several joined by "+"."""
        return str(self["concept"])

    def value(self, metric: str) -> float | None:
        """The number of the erased model; None if it was not measured."""
        return self.metrics[metric].value if metric in self.metrics else None


def read_run(folder: Path) -> FinishedRun:
    """Raises UserError if the settings or the metrics are missing or damaged."""
    return FinishedRun(folder, read_settings(folder), store.read(folder / "metrics.json"))


def read_runs(folder: Path) -> list[FinishedRun]:
    """All runs below `folder`, at any depth. A damaged run is left out, with a warning that names it.

    Raises UserError if there is no run.
    """
    runs = []
    for path in sorted(_run_folders(folder)):
        try:
            runs.append(read_run(path))
        except UserError as error:
            log.warning("%s is left out. %s", path, error)
    if not runs:
        raise UserError(f"No run under {folder} has metrics: run the evaluate stage of one first.")
    return runs


def _run_folders(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        if "metrics.json" in files and ".hydra" in folders:
            yield Path(place)
            folders.clear()  # no run lies within another


def read_settings(folder: Path) -> dict[str, object]:
    """The settings of a run, see `FinishedRun`. Raises UserError if `folder` is not the folder of a run."""
    try:
        return _settings(folder)
    except (AttributeError, TypeError) as error:
        raise UserError(f"{folder / '.hydra'} is damaged: {error}.") from None


def _settings(folder: Path) -> dict[str, object]:
    config, choices = _read_yaml(folder / ".hydra" / "resolved.yaml"), _runtime(folder).get("choices") or {}
    places = sorted((config.get("paths") or {}).items(), key=lambda item: -len(str(item[1])))  # the innermost first
    prefixes = {f"{path}/": f"{{{name}}}/" for name, path in places}
    settings = {name: _portable(value, prefixes) for name, value in _flat(config)}
    if after := config.get("after"):
        settings["after"] = "+".join(map(_earlier_run, [after] if isinstance(after, str) else after))
    return settings | {group: _joined(file) for group, file in choices.items() if not group.startswith("hydra/")}


def settings_text(folder: Path) -> str:
    """The settings of a run as YAML, without the folder names of its machine.

    Paths are relative to the working folder, or begin with ${paths.NAME} or with ~. Of each of `paths` itself, only the
    last name remains.

    Raises UserError if `folder` is not the folder of a run.
    """
    path = folder / ".hydra" / "resolved.yaml"
    places = {str(place): f"${{paths.{name}}}" for name, place in (_read_yaml(path).get("paths") or {}).items()}
    text = path.read_text()
    for place in sorted(places, key=len, reverse=True):  # the innermost first
        text = text.replace(f"{place}/", f"{places[place]}/") if os.path.isabs(place) else text
    if cwd := _runtime(folder).get("cwd"):
        text = text.replace(f"{cwd}/", "")
    text = text.replace(f"{Path.home()}/", "~/")
    for place in filter(os.path.isabs, places):  # the paths themselves
        text = re.sub(f" {re.escape(place)}$", f" …/{Path(place).name}", text, flags=re.MULTILINE)
    return text


def _runtime(folder: Path) -> Mapping:
    """Hydra's record of the process: the choices of groups, the working folder."""
    hydra = _read_yaml(folder / ".hydra" / "hydra.yaml")
    return (hydra.get("hydra") or hydra).get("runtime") or {}


def _earlier_run(erasure: str) -> str:
    """The concept and the method of an earlier erasure, the same for all seeds; its path if there is no such run."""
    try:
        settings = read_settings(Path(erasure).parent)
    except UserError:
        return erasure
    request = f"{settings.get('concept')} by {settings.get('method')}"
    return f"{settings['after']}, {request}" if settings.get("after") else request


def _read_yaml(path: Path) -> dict:
    try:
        content = yaml.load(path.read_text(), _LOADER)
    except FileNotFoundError:
        raise UserError(f"{path.parents[1]} is not the folder of a run: it has no .hydra/{path.name}.") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no settings.")
    return content


def _flat(config: Mapping, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif value != "???":
            yield f"{prefix}{key}", _joined(value)


def _joined(value: object) -> object:
    return "+".join(map(str, value)) if isinstance(value, list) else value


def _portable(value: object, prefixes: Mapping[str, str]) -> object:
    if not isinstance(value, str):
        return value
    prefix = next((p for p in prefixes if value.startswith(p)), None)
    return prefixes[prefix] + value.removeprefix(prefix) if prefix else value


def metric_names(runs: Iterable[FinishedRun]) -> list[str]:
    """The metrics that some run has of its erased model, by purpose; an unknown purpose comes before cost."""
    names = dict.fromkeys(name for run in runs for name, metric in run.metrics.items() if metric.value is not None)
    order = {name: place for place, name in enumerate(PURPOSES)}
    return sorted(names, key=lambda name: order.get(purpose(name), order["cost"] - 0.5))


def purpose(metric: str) -> str:
    """The purpose of a metric: the part of its name before the slash."""
    return metric.partition("/")[0]


def by_purpose(metrics: Iterable[str]) -> dict[str, list[str]]:
    """Metrics by their purpose, in order."""
    groups: dict[str, list[str]] = {}
    for metric in metrics:
        groups.setdefault(purpose(metric), []).append(metric)
    return groups


def drawings(run: Path) -> dict[str, Path]:
    """The manifests of a run's images: base and erased, then the others by name ("attacked-cce")."""
    names = {path.stem: path for path in sorted((run / "images").glob("*.csv"))}
    return {name: names[name] for name in sorted(names, key=_place)}


def _place(drawing: str) -> int:
    return DRAWINGS.index(drawing) if drawing in DRAWINGS else len(DRAWINGS)

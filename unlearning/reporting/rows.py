"""Finished runs as rows: the settings of each and its metrics, read from disk without what made them."""

import importlib
import json
import os
import pkgutil
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path

import yaml

from unlearning.errors import UserError

PURPOSES = ("summary", "efficacy", "retention", "fidelity", "robustness", "cost")  # in the order they are read
BY = ("model", "dataset", "concept", "method")
UNEDITED = "none"  # the method that erases nothing
STATED = ("protocol", "better")  # what stands beside a number: how it was measured, and whether "higher" is or "lower"

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # of thousands of runs, in seconds; OmegaConf's takes minutes
_NODE = re.compile(r"\$\{([\w.]+)\}")


def _at(config: Mapping, name: str) -> object:
    value: object = config
    for part in name.split("."):
        value = _resolved(value, config)[part]
    return _resolved(value, config)


def _resolved(value: object, config: Mapping) -> object:
    """`value` with the settings that it names. Raises LookupError for what only a running Hydra could resolve."""
    if isinstance(value, list):
        return [_resolved(item, config) for item in value]
    if not isinstance(value, str) or "${" not in value:
        return value
    if whole := _NODE.fullmatch(value):
        return _at(config, whole[1])
    text = _NODE.sub(lambda node: str(_at(config, node[1])), value)
    if "${" in text:
        raise LookupError(text)
    return text


def _flat(value: object, config: Mapping, name: str = "") -> Iterator[tuple[str, object]]:
    with suppress(LookupError, TypeError):  # what cannot be resolved is no setting of a result
        value = _resolved(value, config)
        if isinstance(value, Mapping):
            for key, inner in value.items():
                yield from _flat(inner, config, f"{name}.{key}" if name else str(key))
        elif value != "???":
            yield name, "+".join(map(str, value)) if isinstance(value, list) else value


def settings(run: Path) -> dict[str, object]:
    """A run's settings by dotted name ("sampler.steps") and, by Hydra group, the file chosen ("method": "esd_x").

    Raises UserError when `run` is not the folder of a run.
    """
    try:
        config, hydra = (
            yaml.load((run / ".hydra" / f"{name}.yaml").read_text(), _LOADER) for name in ("config", "hydra")
        )
    except FileNotFoundError as error:
        raise UserError(f"{run} is not a run's folder: it has no .hydra/{Path(error.filename).name}.") from None
    runtime = hydra.get("hydra", hydra).get("runtime") or {}
    choices = {k: v for k, v in (runtime.get("choices") or {}).items() if not k.startswith("hydra/")}
    return {**dict(_flat(config, config)), **choices}


def _runs(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        if "metrics.json" in files and ".hydra" in folders:
            yield Path(place)
            folders.clear()  # no run lies within another


def rows(folder: Path) -> list[dict]:
    """Every run under `folder`, at any depth: its settings, its metrics by "purpose/name", and "run", its folder."""
    found = sorted(_runs(Path(folder)))
    return [{**settings(run), **json.loads((run / "metrics.json").read_text()), "run": run} for run in found]


def measured(names: Iterable[str]) -> list[str]:
    """Those of `names` that are metrics of the erased model, by purpose; their order is otherwise kept."""
    parts = {name: (*name.split("/"), "") for name in names}
    found = [
        n for n, (purpose, *rest) in parts.items() if purpose in PURPOSES and any(rest) and not {*STATED} & {*rest}
    ]
    return sorted(found, key=lambda n: PURPOSES.index(parts[n][0]))


def directions(rows: Iterable[Mapping] | None = None) -> dict[str, bool]:
    """Whether higher is better, by "purpose/name": as `rows` state it, and where one does not, as the evaluators know.

    To ask these is to import them, which takes seconds; one that cannot be imported is silent.
    """
    stated: dict[str, bool] = {}
    silent = rows is None
    for row in rows or ():
        own = {key.removesuffix("/better"): value == "higher" for key, value in row.items() if key.endswith("/better")}
        silent |= not own and any(key.endswith("/protocol") for key in row)
        stated |= own
    return (_declared() if silent else {}) | stated


def _declared() -> dict[str, bool]:
    known: dict[str, bool] = {}
    with suppress(ImportError):
        import unlearning.evaluators as package
        from unlearning.evaluators.base import Evaluator

        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            with suppress(ImportError):
                importlib.import_module(module.name)
        kinds = [Evaluator]
        for kind in kinds:
            kinds += kind.__subclasses__()
            if isinstance(kind.higher_is_better, Mapping):
                known |= kind.higher_is_better
    return known

"""Which runs form a row of a table, which rows compete, and what rows are called.

The runs of a row agree in every setting that decides a result; they differ in the seed and in what `by` leaves out.
Rows compete if they differ in nothing but the method.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate

from unlearning.config.decisive import decides
from unlearning.reporting.formats import Cell, listed
from unlearning.reporting.runs import UNEDITED, FinishedRun

BY = ("model", "dataset", "concept", "method")
METHOD = ("method", "trainer", "after")  # groups of settings in which competing rows may differ

Key = tuple  # the values of a row's settings
Place = tuple  # the values of the conditions, and the concept: runs of one place should share a protocol

_SPECIFIC = re.compile(r"\w*\d\w*(?:\.\w+)*")  # a number, a version, a digest


def merged(runs: Iterable[FinishedRun]) -> list[FinishedRun]:
    """Merges runs that generated the same images with the same erasure, but measured different metrics.

    Runs that measured one metric by different protocols are not merged.
    """
    same: dict[tuple, list[FinishedRun]] = {}
    for run in runs:
        decisive = sorted((name, str(value)) for name, value in run.settings.items() if decides(name))
        group = same.setdefault((run.concept, *decisive), [])
        for i, other in enumerate(group):
            if _agree(run, other):
                group[i] = replace(other, metrics={**run.metrics, **other.metrics})
                break
        else:
            group.append(run)
    return [run for group in same.values() for run in group]


def _agree(run: FinishedRun, other: FinishedRun) -> bool:
    """Whether the metrics that both have share their protocols. Costs are not compared: they are of one erasure."""
    both = {name for name in run.metrics.keys() & other.metrics.keys() if not name.startswith("cost/")}
    return all(run.metrics[name].protocol == other.metrics[name].protocol for name in both)


def group_runs(runs: Iterable[FinishedRun], by: Sequence[str]) -> dict[Key, list[FinishedRun]]:
    """The runs of each row, by their values of the settings `by`; rows are sorted, the unedited model first."""
    groups: dict[Key, list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault(tuple(run[name] for name in by), []).append(run)
    return {key: groups[key] for key in sorted(groups, key=lambda key: [_order(value) for value in key])}


def _order(value: object) -> tuple:
    return (0, value, "") if isinstance(value, int | float) else (value != UNEDITED, 0, str(value))


def group_of(setting: str) -> str:
    """The Hydra group of a setting: "method" for method.eta and for student@method.student."""
    return setting.rpartition("@")[2].partition(".")[0]


def conditions(by: Iterable[str]) -> list[str]:
    """Those of the settings `by` that competing rows have in common: all but the method's own."""
    return [name for name in by if group_of(name) not in METHOD]


def competitors(keys: Iterable[Key], by: Sequence[str]) -> list[list[Key]]:
    """The rows in groups that agree in all conditions."""
    places = [i for i, name in enumerate(by) if group_of(name) not in METHOD]
    groups: dict[tuple, list[Key]] = {}
    for key in keys:
        groups.setdefault(tuple(key[i] for i in places), []).append(key)
    return list(groups.values())


def separating(runs: Sequence[FinishedRun], by: Sequence[str]) -> tuple[str, ...]:
    """`by`, and the settings to add so that runs with different decisive settings are neither averaged nor compared.

    Adds as few settings as possible. A setting that a run does not have is not a difference.
    """
    names = dict.fromkeys(name for run in runs for name in run.settings if _decides(name))
    for name in sorted((name for name in names if _differ(runs, name)), key=_precedence):
        if name not in by and any(_differ(group, name) for group in group_runs(runs, _held_equal(name, by)).values()):
            by = (*by, name)
    return tuple(by)


def _decides(name: str) -> bool:
    """Whether runs that differ in a setting must not be averaged.

    Rows are means over seeds, and a metric's protocol states the evaluator's settings. Whether a run was attacked
    changes no other metric; the settings of an attack change the metrics of the attack.
    """
    return name not in ("seed", "attack") and group_of(name) != "evaluator" and decides(name, "numbers")


def _differ(runs: Iterable[FinishedRun], name: str) -> bool:
    return len({repr(run[name]) for run in runs if name in run.settings or _is_null(run, name)}) > 1


def _is_null(run: FinishedRun, name: str) -> bool:
    """Whether the run has null for a section that contains this setting in other runs, such as `scheduler: null`."""
    return any(run.settings.get(above, run) is None for above in accumulate(name.split("."), "{}.{}".format))


def _precedence(name: str) -> tuple[bool, bool]:
    """The sort key of a setting: conditions first, because a method's settings may follow from them; the chosen file of
    a group before the group's settings, because it says more.
    """
    return group_of(name) in METHOD, "." in name and "@" not in name


def _held_equal(name: str, by: Sequence[str]) -> list[str]:
    """The settings in which runs have to agree before a difference in `name` separates them.

    A method's settings may depend on the model, the dataset and the concept. A dataset's settings may depend on the
    concept, as its template or its neighbours do.
    """
    if group_of(name) in METHOD:
        return list(dict.fromkeys((*by, *BY)))
    if name.startswith("dataset.") and name != "dataset.images_per_prompt":
        return list(dict.fromkeys((*conditions(by), "concept")))
    return conditions(by)


def base_runs(runs: Sequence[FinishedRun], by: Sequence[str]) -> list[FinishedRun]:
    """The metrics of the unedited model as runs of the method "none", for concepts without such a run.

    Runs that differ in nothing but the method share one.
    """
    known = {run.concept for run in runs if run["method"] == UNEDITED}
    of_base: dict[tuple, FinishedRun] = {}
    for run in runs:
        metrics = {name: metric.of_base() for name, metric in run.metrics.items() if metric.base is not None}
        if run.concept not in known and metrics:
            settings = {name: value for name, value in run.settings.items() if group_of(name) not in METHOD}
            same = (run.concept, run["seed"], *(settings.get(name) for name in by))
            of_base.setdefault(same, FinishedRun(run.folder, {**settings, "method": UNEDITED}, metrics))
    return list(of_base.values())


def concepts(runs: Iterable[FinishedRun]) -> frozenset[str]:
    """The concepts that the runs erase."""
    return frozenset(run.concept for run in runs)


def label_cells(key: Key) -> list[Cell]:
    """The cells that name a row."""
    return [Cell("–" if value is None else str(value), values=(value,)) for value in key]


def label(key: Key) -> str:
    """The name of a row in a footnote."""
    return ", ".join(cell.text for cell in label_cells(key))


def shortened(protocols: Mapping[Place, str]) -> str:
    """Protocols by place in one line; all places are tuples of one length.

    Protocols that differ in numbers and digests only share one text. A place is named by those of its parts on which
    the protocol depends: "1000 real (…). Of cat: f9bfbddf; of key: 3ab08c11".
    """
    parts = _deciding_parts(protocols)
    kinds: dict[str, dict[str, str]] = {}
    for place, protocol in protocols.items():
        kinds.setdefault(_SPECIFIC.sub("…", protocol), {})[" ".join(str(place[i]) for i in parts)] = protocol
    texts = []
    for places in kinds.values():
        values = {protocol: _SPECIFIC.findall(protocol) for protocol in places.values()}
        differs = [len({*column}) > 1 for column in zip(*values.values(), strict=True)]
        protocol, first = next(iter(values.items()))
        text, gaps = "", _SPECIFIC.split(protocol)
        for gap, value, d in zip(gaps, [*first, ""], [*differs, False], strict=True):
            text += gap + ("…" if d else value)
        for way, numbers in values.items() if any(differs) else ():
            names = listed(place for place, other in places.items() if other == way)
            own = ", ".join(value for value, d in zip(numbers, differs, strict=True) if d)
            text += f"{'. Of' if way == protocol else '; of'} {names}: {own}"
        texts.append(text if any(differs) or len(kinds) == 1 else f"of {listed(places)}: {text}")
    return " | ".join(texts)


def _deciding_parts(protocols: Mapping[Place, str]) -> list[int]:
    """The indices of the parts of a place that decide its protocol. The first parts are the first to be left out."""
    kept = list(range(len(next(iter(protocols), ()))))
    for part in range(len(kept)):
        fewer = [i for i in kept if i != part]
        pairs = {(tuple(place[i] for i in fewer), protocol) for place, protocol in protocols.items()}
        if len({place for place, _ in pairs}) == len(pairs):
            kept = fewer
    return kept

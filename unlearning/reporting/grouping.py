"""Which runs belong together: those that are averaged into a row, and the rows that are rivals.

Runs of another model, dataset or sampler have rows of their own, and so have those of one method with other settings.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate

from unlearning.config.decisive import decides
from unlearning.reporting.rows import BY, UNEDITED

GROUPS = ("model", "dataset", "sampler", "method", "trainer")  # whose settings decide a result
OWN = ("method", "trainer")  # of these, those in which rivals may differ

Key = tuple  # a row's values of the settings that rows are told apart by


def _first_the_unedited(value: object) -> tuple:
    return (0, value, "") if isinstance(value, int | float) else (value != UNEDITED, 0, str(value))


def grouped(runs: Iterable[Mapping], by: Sequence[str]) -> dict[Key, list[Mapping]]:
    """The runs of each row, in the order of the rows."""
    groups: dict[Key, list[Mapping]] = {}
    for run in runs:
        groups.setdefault(tuple(run.get(key) for key in by), []).append(run)
    return {key: groups[key] for key in sorted(groups, key=lambda key: [_first_the_unedited(v) for v in key])}


def rivals(keys: Iterable[Key], by: Sequence[str]) -> list[list[Key]]:
    """Those of the rows that differ in the method and its settings alone, together."""
    places = [i for i, name in enumerate(by) if name in shared(by)]
    found: dict[tuple, list[Key]] = {}
    for key in keys:
        found.setdefault(tuple(key[i] for i in places), []).append(key)
    return list(found.values())


def concepts(runs: Iterable[Mapping]) -> frozenset[str]:
    return frozenset(str(run.get("concept")) for run in runs)


def group_of(setting: str) -> str:
    """The Hydra group that a setting is of: "method", of method.eta and of student@method.student."""
    return setting.rpartition("@")[2].partition(".")[0]


def shared(by: Sequence[str]) -> list[str]:
    """Of the settings that rows are told apart by, those that rivals have in common: all but the method's own."""
    return [name for name in by if group_of(name) not in OWN]


def told_apart(runs: Sequence[Mapping], by: Sequence[str]) -> tuple[str, ...]:
    """`by` and, of the settings that decide a result, those in which runs differ that would be averaged or compete.

    As few as tell it all. A setting that a run does not state differs from nothing; nor does one that changes how fast
    a result is made, or that goes with the concept.
    """
    names = [name for name in dict.fromkeys(n for run in runs for n in run) if group_of(name) in GROUPS]
    found = [name for name in names if _differ(runs, name) and decides(name)]
    for name in sorted(found, key=_precedence):
        if name not in by and any(_differ(group, name) for group in grouped(runs, _alike(name, by)).values()):
            by = (*by, name)
    return tuple(by)


def _differ(runs: Iterable[Mapping], name: str) -> bool:
    return len({repr(run.get(name)) for run in runs if name in run or _is_null(run, name)}) > 1


def _is_null(run: Mapping, name: str) -> bool:
    """Whether a run states that there is nothing of which this could be a setting, as a null scheduler has no rate."""
    return any(run.get(above, run) is None for above in accumulate(name.split("."), "{}.{}".format))


def _precedence(name: str) -> tuple[bool, bool]:
    """What rivals share comes first, for a method's settings may follow it; and what was chosen of a group, for it says
    more than its settings.
    """
    return group_of(name) in OWN, "." in name and "@" not in name


def _alike(name: str, by: Sequence[str]) -> list[str]:
    """The settings by which runs belong together that must not differ in the setting `name`.

    A method's own are held against those of the same method, model, dataset and concept, for they may follow these. The
    dataset's may be the concept's, as its template or its neighbours are.
    """
    if group_of(name) in OWN:
        return list(dict.fromkeys((*by, *BY)))
    if name.startswith("dataset.") and name != "dataset.images_per_prompt":
        return list(dict.fromkeys((*shared(by), "concept")))
    return shared(by)

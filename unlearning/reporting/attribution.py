"""Which commit made which row of a table, by what each run recorded of itself."""

from collections.abc import Mapping, Sequence

from unlearning.reporting.comparison import words
from unlearning.reporting.grouping import grouped
from unlearning.reporting.sheet import Cell, Note, Sheet
from unlearning.tracking.provenance import facts, maker, read

UNKNOWN = "not recorded"
MIXED, CHANGED, SILENT, NAMELESS = "†", "‡", "§", "¶"
NOTES = {
    MIXED: "More than one commit made this row.",
    CHANGED: "Made from a tree with changes that the commit does not have.",
    SILENT: "A run without a provenance.json: nobody knows what made it.",
    NAMELESS: "Made by code of no known commit: an installed package, or a copy without its history.",
}


def attribution(runs: Sequence[Mapping], by: Sequence[str]) -> tuple[Sheet, bool]:
    """The rows of the runs with the commits that made them and what else differs between their sittings.

    And whether every row comes of one known commit, unchanged and recorded.
    """
    header = [*(Cell(name) for name in by), Cell("n"), Cell("made by"), Cell("differs between its runs")]
    lines, found = [], set()
    for key, group in grouped(runs, by).items():
        made = {run["run"]: read(run["run"]) or {} for run in group}
        makers: dict[str, list[str]] = {}
        for run in group:
            for name in _makers(made[run["run"]]):
                makers.setdefault(name, []).append(f"{run.get('seed')}")
        sittings = [sitting for each in made.values() for sitting in each.get("sittings", ())]
        stored = [code for each in made.values() for codes in each.get("stored", {}).values() for code in codes]
        faults = {
            MIXED: len(makers) > 1,
            CHANGED: any(code and code["dirty"] for code in (*sittings, *stored)),
            SILENT: not all(each.get("sittings") for each in made.values()),
            NAMELESS: any(code and not code["commit"] for code in (*sittings, *stored)),
        }
        marks = tuple(mark for mark, is_so in faults.items() if is_so)
        found |= {*marks}
        told = (
            next(iter(makers))
            if len(makers) == 1
            else "; ".join(f"{m} (seed {', '.join(s)})" for m, s in makers.items())
        )
        cells = Cell(str(len(group))), Cell(told, marks=marks), Cell(_differences(sittings) or "–")
        lines.append([*words(key), *cells])
    return Sheet(
        len(header), header, lines, [Note(text, mark) for mark, text in NOTES.items() if mark in found]
    ), not found


def _makers(made: Mapping) -> Sequence[str]:
    """Who made a run, and of what it took from the store, who else: "a1b2c3d4e5", "pictures by f6a7b8c9d0"."""
    own = dict.fromkeys(map(maker, made.get("sittings", ()))) or {UNKNOWN: None}
    others = [f"{kind} by {maker(m)}" for kind, ms in made.get("stored", {}).items() for m in ms if maker(m) not in own]
    return [*own, *others]


def _differences(sittings: Sequence[Mapping]) -> str:
    """The versions and the hardware that are not the same in all: "torch 2.8.0 | 2.9.0"."""
    values: dict[str, dict[str, None]] = {}
    for sitting in sittings:
        for name, value in facts(sitting).items():
            values.setdefault(name, {})[str(value)] = None
    return "; ".join(f"{name} {' | '.join(seen)}" for name, seen in values.items() if len(seen) > 1)

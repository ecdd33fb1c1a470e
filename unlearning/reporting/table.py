"""Finished runs as one table: the mean of each metric over the seeds, and the standard error of that mean.

unlearn-table outputs/runs --metrics 'efficacy/*' retention/acc_s --format latex
unlearn-table outputs/runs --by method --published experiments/unguide/published.csv
unlearn-table outputs/runs --check
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from unlearning.errors import UserError, did_you_mean
from unlearning.reporting.comparison import Comparison
from unlearning.reporting.formats import FORMATS, Cell, Note, Table
from unlearning.reporting.grouping import BY, group_runs, label_cells, separating
from unlearning.reporting.published import read_published
from unlearning.reporting.runs import FinishedRun, read_runs
from unlearning.tracking.provenance import facts, maker, read

MIXED, CHANGED, UNRECORDED, NO_COMMIT = "†‡§¶"
FAULTS = {
    MIXED: "More than one commit made this row.",
    CHANGED: "Made from a tree with uncommitted changes.",
    UNRECORDED: "A run without a provenance.json: the code that made it is not known.",
    NO_COMMIT: "Made by code of no known commit: an installed package, or a copy without its history.",
}


def table(
    folder: Path,
    metrics: Sequence[str] | None = None,
    by: Sequence[str] = BY,
    format: str = "markdown",
    published: Path | None = None,
) -> str:
    """The runs under `folder` as text; what is averaged, ranked and marked is explained in comparison.py.

    Args:
        metrics: Names or patterns ("retention/*"); None for all.
        by: Names of Hydra groups or dotted settings ("method.lamb") that rows differ in. Settings that decide a result
            and differ are added.
        format: "markdown", "latex", "html" or "csv". CSV has every mean, standard error and protocol in a column.
        published: A CSV file of a paper's numbers, see published.py. They are shown beside ours with the difference.

    Raises UserError if there are no runs, or none has a metric or a setting of the arguments.
    """
    numbers = read_published(published) if published else None
    return FORMATS[format](Comparison(_runs(folder, by), by, metrics, numbers).table)


def check(folder: Path, by: Sequence[str] = BY, format: str = "markdown") -> tuple[str, bool]:
    """The rows of the same table with the commits that made them, and whether all rows are sound.

    A row is sound if one known commit without changes made all of it. Raises UserError as `table` does.
    """
    runs = _runs(folder, by)
    made = attribution(runs, separating(runs, by))
    return FORMATS[format](made), not made.notes


def _runs(folder: Path, by: Sequence[str]) -> list[FinishedRun]:
    runs = read_runs(folder)
    settings = {name for run in runs for name in run.settings}
    for name in (name for name in by if name not in settings.union(BY)):
        hint = did_you_mean(name, settings) or " Name a group, as method, or a dotted setting, as sampler.steps."
        raise UserError(f"No run has the setting {name} of --by.{hint}")
    return runs


def attribution(runs: Sequence[FinishedRun], by: Sequence[str]) -> Table:
    """The commits that made each row, and the versions and hardware that differ between its runs. Notes are faults."""
    header, lines = [*(Cell(name) for name in by), Cell("n"), Cell("made by"), Cell("differs between its runs")], []
    for key, group in group_runs(runs, by).items():
        makers: dict[str, list[str]] = {}  # seeds by code
        processes, codes, recorded = [], [], True
        for run in group:
            record = read(run.folder) or {}
            for name in _makers(record):
                makers.setdefault(name, []).append(str(run["seed"]))
            recorded &= bool(record.get("processes"))
            processes += record.get("processes", ())
            codes += [code for stored in record.get("stored", {}).values() for code in stored]
        codes = [code for code in (*processes, *codes) if code]
        faults = {
            MIXED: len(makers) > 1,
            CHANGED: any(code["dirty"] for code in codes),
            UNRECORDED: not recorded,
            NO_COMMIT: not all(code["commit"] for code in codes),
        }
        names = [name if len(makers) == 1 else f"{name} (seed {', '.join(seeds)})" for name, seeds in makers.items()]
        made = Cell("; ".join(names), marks=tuple(mark for mark, fault in faults.items() if fault))
        lines.append([*label_cells(key), Cell(str(len(group))), made, Cell(_differences(processes) or "–")])
    marks = {mark for line in lines for mark in line[-2].marks}
    return Table(len(header), header, lines, [Note(text, mark) for mark, text in FAULTS.items() if mark in marks])


def _makers(record: Mapping) -> list[str]:
    """The code that made a run, and the code of what it took from the store if it differs: "pictures by f6a7b8c9d0"."""
    own = dict.fromkeys(map(maker, record.get("processes", ()))) or {"not recorded": None}
    stored = ((kind, maker(code)) for kind, codes in record.get("stored", {}).items() for code in codes)
    return [*own, *(f"{kind} by {name}" for kind, name in stored if name not in own)]


def _differences(processes: Sequence[Mapping]) -> str:
    """The versions and the hardware that are not the same in all: "torch 2.8.0 | 2.9.0"."""
    values: dict[str, dict[str, None]] = {}
    for process in processes:
        for name, value in facts(process).items():
            values.setdefault(name, {})[str(value)] = None
    return "; ".join(f"{name} {' | '.join(seen)}" for name, seen in values.items() if len(seen) > 1)


def main() -> None:
    """The console command unlearn-table."""
    parser = argparse.ArgumentParser(prog="unlearn-table", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="runs at any depth below it")
    parser.add_argument("--metrics", nargs="+", help="names or patterns, as 'retention/*'; by default all")
    parser.add_argument("--by", nargs="+", default=BY, help="what rows differ in: groups or dotted settings")
    parser.add_argument("--published", type=Path, help="a paper's numbers, as experiments/*/published.csv")
    parser.add_argument("--format", choices=FORMATS, default="markdown")
    parser.add_argument(
        "--check",
        action="store_true",
        help="instead, show which commit made each row; the exit status is 1 if a row mixes commits (of stored images "
        "and evaluations too), was made from a tree with uncommitted changes, or has no record",
    )
    options = vars(parser.parse_args())
    try:
        if options.pop("check"):
            text, sound = check(options["folder"], options["by"], options["format"])
        else:
            text, sound = table(**options), True
    except UserError as error:
        raise SystemExit(str(error)) from None
    print(text, end="")
    sys.exit(not sound)


if __name__ == "__main__":
    main()

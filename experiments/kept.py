"""Tables of runs that are kept as CSV files, a line for each run, and written into the README beside them.

    python -m experiments.kept experiments/erasers/key.csv                 # writes the table again
    python -m experiments.kept experiments/erasers/key.csv outputs/runs    # keeps the runs of this folder first

The columns of the file say what is kept: settings (method, seed), then metrics (robustness/asr_cce). A run with one
of these metrics has a line. Its numbers replace earlier ones of the same settings; those that it lacks stay. In the
table, seeds are averaged. It stands between <!-- NAME --> and <!-- /NAME -->, where NAME.csv is the file.
"""

import argparse
import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from tabulate import tabulate

from unlearning.errors import UserError
from unlearning.reporting.formats import UNITS, decimals, quantity
from unlearning.reporting.runs import FinishedRun, read_runs
from unlearning.store.files import write_atomically

SEED, CONTROLS = "seed", ("none", "oracle")
Lines = dict[tuple[str, ...], dict[str, str]]  # a run's numbers by metric, "" where there is none, by its settings


def read(file: Path) -> tuple[list[str], list[str], Lines]:
    """The settings and the metrics that are kept, and the lines."""
    with file.open(newline="") as opened:
        reader = csv.DictReader(opened)
        columns = list(reader.fieldnames or ())
        settings = [name for name in columns if "/" not in name]
        lines = {tuple(line.pop(name) for name in settings): line for line in reader}
    return settings, [name for name in columns if name not in settings], lines


def lines_of(runs: Sequence[FinishedRun], settings: Sequence[str], metrics: Sequence[str]) -> Lines:
    """The lines of finished runs.

    Raises:
        UserError: If two runs of the same settings have different numbers.
    """
    lines: Lines = {}
    for run in runs:
        values = {name: run.value(name) for name in metrics}
        line = {name: "" if value is None else f"{value:.6g}" for name, value in values.items()}
        key = tuple(str(run[name]) for name in settings)
        known = lines.get(key, {})
        if any(value and known.get(name, "") not in ("", value) for name, value in line.items()):
            raise UserError(f"{run.folder}: another run of {', '.join(key)} has other numbers. Name one folder only.")
        if any(line.values()):
            lines[key] = joined(known, line)
    return lines


def joined(earlier: Mapping[str, str], later: Mapping[str, str]) -> dict[str, str]:
    """The later numbers, and the earlier ones where there is no later one."""
    return {name: value or earlier.get(name, "") for name, value in later.items()}


def write(file: Path, settings: Sequence[str], metrics: Sequence[str], lines: Lines) -> None:
    """The file, controls first."""

    def place(key: tuple[str, ...]) -> tuple:
        return not set(CONTROLS) & set(key), [name.zfill(9) if name.isdigit() else name for name in key]

    order = sorted(lines, key=place)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*settings, *metrics])
    writer.writerows([*key, *(lines[key][name] for name in metrics)] for key in order)
    write_atomically(file, text.getvalue())


def table(settings: Sequence[str], metrics: Sequence[str], lines: Lines) -> str:
    """Mean ± standard error over the seeds; Markdown."""
    place = settings.index(SEED)
    groups: dict[tuple[str, ...], list[Mapping[str, str]]] = {}
    for key, line in lines.items():
        groups.setdefault(key[:place] + key[place + 1 :], []).append(line)
    numbers = {
        (key, name): [float(line[name]) for line in own if line[name]]
        for key, own in groups.items()
        for name in metrics
    }
    places = {name: decimals([n for (_, of), own in numbers.items() if of == name for n in own]) for name in metrics}

    def cell(name: str, values: Sequence[float]) -> str:
        if not values:
            return "–"
        errors = [statistics.stdev(values) / len(values) ** 0.5] if len(values) > 1 else []
        if name in UNITS:
            return quantity(name, statistics.mean(values), *errors)
        return " ± ".join(f"{number:,.{places[name]}f}" for number in (statistics.mean(values), *errors))

    head = [*(name for name in settings if name != SEED), "seeds", *(f"`{name.partition('/')[2]}`" for name in metrics)]
    rows = [[*(f"`{name}`" for name in key), len(groups[key]), *(cell(name, numbers[key, name]) for name in metrics)]
            for key in groups]  # fmt: skip
    return tabulate(rows, head, "github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="the CSV file")
    parser.add_argument("folder", type=Path, nargs="?", help="of runs to keep")
    options = parser.parse_args()
    settings, metrics, lines = read(options.file)
    readme, name = options.file.with_name("README.md"), options.file.stem
    text = readme.read_text()
    if SEED not in settings or not all(mark in text for mark in (f"<!-- {name} -->", f"<!-- /{name} -->")):
        raise UserError(f"{options.file} needs a column {SEED!r}, and {readme} the marks of the table {name!r}.")
    if options.folder:
        found = lines_of(read_runs(options.folder), settings, metrics)
        lines |= {key: joined(lines.get(key, {}), line) for key, line in found.items()}
    write(options.file, settings, metrics, lines)
    before, rest = text.split(f"<!-- {name} -->")
    after = rest.split(f"<!-- /{name} -->")[1]
    own = f"<!-- {name} -->\n{table(*read(options.file))}\n<!-- /{name} -->"
    write_atomically(readme, before + own + after)


if __name__ == "__main__":
    main()

"""Runs on disk as one table: a row per setting, with the mean over its seeds and the standard error of that mean.

python -m unlearning.reporting.table outputs/runs --metrics 'efficacy/*' retention/acc_s --format csv
python -m unlearning.reporting.table outputs/runs --by method --published experiments/unguide/published.csv
"""

import argparse
import csv
import importlib
import io
import json
import pkgutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import mean, stdev

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from unlearning.concepts import UserError

PURPOSES = ("summary", "efficacy", "retention", "fidelity", "robustness", "cost")  # in the order they are read
BY = ("model", "dataset", "concept", "method")
UNEDITED = "none"  # the method that erases nothing
AVERAGE = "average"  # the concept of a published number that is a mean over a paper's concepts


# --- reading runs -----------------------------------------------------------------------------------------------------


def _flat(config: DictConfig, prefix: str = "") -> Iterator[tuple[str, object]]:
    for key in config:
        with suppress(OmegaConfBaseException):  # what only a running Hydra could resolve is no setting of a result
            value = config[key]
            if isinstance(value, DictConfig):
                yield from _flat(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", "+".join(map(str, value)) if isinstance(value, ListConfig) else value


def settings(run: Path) -> dict[str, object]:
    """A run's settings by dotted name ("sampler.steps") and, by Hydra group, the file chosen ("method": "esd_x").

    Raises UserError when `run` is not the folder of a run.
    """
    try:
        config, hydra = (OmegaConf.load(run / ".hydra" / f"{name}.yaml") for name in ("config", "hydra"))
    except FileNotFoundError as error:
        raise UserError(f"{run} is not a run's folder: it has no .hydra/{Path(error.filename).name}.") from None
    choices = OmegaConf.select(hydra, "hydra.runtime.choices") or OmegaConf.select(hydra, "runtime.choices") or {}
    return {**dict(_flat(config)), **{k: v for k, v in choices.items() if not k.startswith("hydra/")}}


def rows(folder: Path) -> list[dict]:
    """Every run under `folder`, at any depth: its settings, its metrics by "purpose/name", and "run", its folder."""
    runs = sorted(file.parent for file in Path(folder).rglob("metrics.json") if (file.parent / ".hydra").is_dir())
    return [{**settings(run), **json.loads((run / "metrics.json").read_text()), "run": run} for run in runs]


def measured(names: Iterable[str]) -> list[str]:
    """Those of `names` that are metrics of the erased model, by purpose; their order is otherwise kept."""
    parts = {name: (*name.split("/"), "") for name in names}
    found = [n for n, (purpose, *rest) in parts.items() if purpose in PURPOSES and any(rest) and "protocol" not in rest]
    return sorted(found, key=lambda n: PURPOSES.index(parts[n][0]))


def directions() -> dict[str, bool]:
    """Whether higher is better, by "purpose/name", as the evaluators know it. One that cannot be imported is silent."""
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


def decimals(values: Iterable[float]) -> int:
    """How many decimals show the largest of `values` to three or four figures; the others then line up with it."""
    largest = max(map(abs, values), default=0)
    return 0 if largest >= 1000 else 1 if largest >= 10 else 2 if largest >= 1 else 3


# --- from runs to cells -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """One metric over a group's seeds: its mean, the standard error of the mean (None for one seed), and how many."""

    mean: float
    error: float | None
    n: int
    protocols: tuple[str, ...]

    @classmethod
    def of(cls, runs: Sequence[Mapping], metric: str) -> "Cell | None":
        runs = [r for r in runs if isinstance(r.get(metric), int | float) and r[metric] == r[metric]]  # no null, no NaN
        values = [r[metric] for r in runs]
        protocols = tuple(dict.fromkeys(r.get(f"{metric}/protocol", "") for r in runs))
        error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
        return cls(mean(values), error, len(values), protocols) if values else None


def _first_the_unedited(value: object) -> tuple:
    return (0, value, "") if isinstance(value, int | float) else (value != UNEDITED, 0, str(value))


def _grouped(runs: Sequence[Mapping], by: Sequence[str]) -> dict[tuple, list[Mapping]]:
    groups: dict[tuple, list[Mapping]] = {}
    for run in runs:
        groups.setdefault(tuple(run.get(key) for key in by), []).append(run)
    return {key: groups[key] for key in sorted(groups, key=lambda key: [_first_the_unedited(v) for v in key])}


def _chosen(runs: Sequence[Mapping], patterns: Sequence[str] | None) -> list[str]:
    available = measured(name for run in runs for name in run)
    chosen = [m for p in patterns or ["*"] for m in available if fnmatchcase(m, p)]
    for pattern in patterns or ():
        if not any(fnmatchcase(m, pattern) for m in available):
            raise UserError(f"No run has the metric {pattern}. There are: {', '.join(available)}.")
    return list(dict.fromkeys(chosen))


def published(path: Path) -> dict[tuple[str, str, str], float]:
    """A paper's numbers by (method, concept, metric), of a CSV with the columns method, concept, metric, value, source.

    Raises UserError where there is no such file, or it lacks a column.
    """
    try:
        with path.open(newline="") as file:
            return {(r["method"], r["concept"], r["metric"]): float(r["value"]) for r in csv.DictReader(file)}
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.") from None
    except KeyError as missing:
        raise UserError(f"{path} has no column {missing}; it needs method, concept, metric and value.") from None


# --- from cells to text -----------------------------------------------------------------------------------------------


def table(
    folder: Path,
    metrics: Sequence[str] | None = None,
    by: Sequence[str] = BY,
    format: str = "markdown",
    published: Path | None = None,
) -> str:
    """The runs under `folder`, averaged over what `by` does not tell apart: the seeds.

    In bold: the best of the methods that differ in nothing else and were measured by the column's usual protocol. The
    unedited model does not compete.

    Args:
        metrics: Names or patterns ("retention/*"); None for all.
        by: Names of Hydra groups or dotted names in the config ("method.lamb").
        format: "markdown" or "csv"; the latter has every mean, standard error and protocol in a column of its own.
        published: A file of a paper's numbers, shown beside ours with the difference. Rows that do not tell concepts
            apart are held against the paper's average.

    Raises UserError where there are no runs, or none has a metric.
    """
    runs = rows(folder)
    if not runs:
        raise UserError(f"No run under {folder} has a metrics.json: run the evaluate stage of one first.")
    names, groups = _chosen(runs, metrics), _grouped(runs, by)
    cells = {(key, m): cell for key, group in groups.items() for m in names if (cell := Cell.of(group, m))}
    theirs = _theirs(published, names, by, groups) if published else {}
    return {"markdown": _markdown, "csv": _csv}[format](names, by, groups, cells, theirs)


def _theirs(path: Path, names, by, groups) -> dict[tuple, float]:
    """The paper's number for each cell that it has one for."""
    numbers, found = published(Path(path)), {}
    for key in groups:
        asked = dict(zip(by, key, strict=True))
        row = (asked.get("method"), asked.get("concept", AVERAGE))
        found |= {(key, m): numbers[*row, m] for m in names if (*row, m) in numbers}
    return found


def _csv(names, by, groups, cells, theirs) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    parts = ("", "/se", "/protocol", *(("/published", "/delta") if theirs else ()))
    writer.writerow([*by, "n", *(m + part for m in names for part in parts)])
    for key, group in groups.items():
        values = []
        for m in names:
            cell, paper = cells.get((key, m)), theirs.get((key, m), "")
            values += [cell.mean, cell.error, " | ".join(cell.protocols)] if cell else [""] * 3
            if theirs:
                values += [paper, cell.mean - paper if cell and paper != "" else ""]
        writer.writerow([*key, len(group), *values])
    return text.getvalue()


def _markdown(names, by, groups, cells, theirs) -> str:
    better, header, protocols, notes = directions(), [*by, "n"], [], []
    body = {key: [*("–" if v is None else str(v) for v in key), str(len(group))] for key, group in groups.items()}
    for m in names:
        column = {key: cells[key, m] for key in groups if (key, m) in cells}
        usual = Counter(cell.protocols for cell in column.values()).most_common(1)[0][0] if column else ()
        strange = {key: cell.protocols for key, cell in column.items() if cell.protocols != usual}
        best = _best({k: c for k, c in column.items() if k not in strange}, by, better[m]) if m in better else ()
        places = decimals(cell.mean for cell in column.values())
        for key, group in groups.items():
            text = _text(column.get(key), places, len(group))
            body[key].append((f"**{text}**" if key in best else text) + "†" * (key in strange))
            if (key, m) in theirs and key in column:
                paper = theirs[key, m]
                body[key][-1] += f" ({paper:.{places}f}, {column[key].mean - paper:+.{places}f})"
        for key, others in strange.items():
            stated = " | ".join(protocol or "protocol not stated" for protocol in others)
            notes.append(f"† {m} of {', '.join(map(str, key))}: {stated}")
        header.append(m + {True: " ↑", False: " ↓", None: ""}[better.get(m)])
        if protocol := " | ".join(filter(None, usual)):
            protocols += [protocol] if protocol not in protocols else []
            header[-1] += _raised(protocols.index(protocol) + 1)
    who = ("seed", *BY)
    repeated = [key for key, group in groups.items() if len({tuple(map(run.get, who)) for run in group}) < len(group)]
    for key in repeated:
        body[key][len(by)] += "‡"
    if repeated:
        notes.append("‡ Some of these runs share even the seed, so they differ in another setting; name it after --by.")
    if theirs:
        notes.append("In brackets: the published number, and ours less it.")
    notes = [*(f"{_raised(i)} {protocol}" for i, protocol in enumerate(protocols, 1)), *notes]
    return "\n".join([*_aligned([header, *body.values()], len(by)), *(f"\n{note}" for note in notes)]) + "\n"


def _raised(number: int) -> str:
    return str(number).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))


def _best(column: Mapping[tuple, Cell], by: Sequence[str], higher: bool) -> set[tuple]:
    """The groups with the best mean among those that differ in the method alone; where there is one to beat."""
    method = [name.partition(".")[0] == "method" for name in by]
    rivals: dict[tuple, dict[tuple, float]] = {}
    for key, cell in column.items():
        if ("method", UNEDITED) not in zip(by, key, strict=True):
            others = tuple(value for value, own in zip(key, method, strict=True) if not own)
            rivals.setdefault(others, {})[key] = cell.mean
    tops = {others: (max if higher else min)(means.values()) for others, means in rivals.items()}
    return {key for others, means in rivals.items() if len(means) > 1 for key, v in means.items() if v == tops[others]}


def _text(cell: Cell | None, places: int, n: int) -> str:
    if cell is None:
        return "–"
    text = f"{cell.mean:,.{places}f}" + (f" ± {cell.error:,.{places}f}" if cell.error is not None else "")
    return text + (f" (n={cell.n})" if cell.n < n else "")


def _aligned(lines: Sequence[Sequence[str]], words: int) -> list[str]:
    """A markdown table whose source is a table too; the first `words` columns stand left, the numbers right."""
    lines = [[text.replace("|", "\\|") for text in line] for line in lines]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * w if i < words else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    sides = ["<" if i < words else ">" for i in range(len(widths))]
    padded = [[f"{t:{side}{w}}" for t, side, w in zip(line, sides, widths, strict=True)] for line in lines]
    return [f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:])]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m unlearning.reporting.table", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--metrics", nargs="+", help="names or patterns, as in 'retention/*'; all of them if not given")
    parser.add_argument("--by", nargs="+", default=BY, help="what tells rows apart: groups or dotted settings")
    parser.add_argument("--published", type=Path, help="a paper's numbers: method, concept, metric, value, source")
    parser.add_argument("--format", choices=("markdown", "csv"), default="markdown")
    try:
        print(table(**vars(parser.parse_args())), end="")
    except UserError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()

"""Runs on disk as one table: a row per setting, with the mean over its seeds and the standard error of that mean.

unlearn-table outputs/runs --metrics 'efficacy/*' retention/acc_s --format latex
unlearn-table outputs/runs --by method --published experiments/unguide/published.csv
unlearn-table outputs/runs --check
"""

import argparse
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from unlearning.errors import UserError
from unlearning.reporting.attribution import attribution
from unlearning.reporting.comparison import compare
from unlearning.reporting.grouping import told_apart
from unlearning.reporting.published import published as read_published
from unlearning.reporting.renderings import FORMATS
from unlearning.reporting.rows import BY, rows


def table(
    folder: Path,
    metrics: Sequence[str] | None = None,
    by: Sequence[str] = BY,
    format: str = "markdown",
    published: Path | None = None,
) -> str:
    """The runs under `folder`, averaged over what `by` does not tell apart: the seeds.

    Runs of another model, dataset or sampler are told apart in any case, and those of one method with other settings.

    The best and the second best are marked, of the methods that differ in nothing else, are means over the same
    concepts and were measured by the protocol that is usual among them. The unedited model does not compete.

    Args:
        metrics: Names or patterns ("retention/*"); None for all.
        by: Names of Hydra groups or dotted names in the config ("method.lamb").
        format: "markdown", "latex", "html" or "csv"; the last has every mean, standard error and protocol in a column
            of its own.
        published: A file of a paper's numbers, shown beside ours with the difference; marked where they are of another
            model or protocol, or do not say. Rows that do not tell concepts apart are held against the paper's average,
            marked where it is over other concepts.

    Raises UserError where there are no runs, or none has a metric or a setting that is asked for.
    """
    numbers = read_published(published) if published else None
    return FORMATS[format](compare(_found(folder, by), metrics, by, numbers))


def check(folder: Path, by: Sequence[str] = BY, format: str = "markdown") -> tuple[str, bool]:
    """Which commit made each row of the table, and whether all of it is told apart by the commit alone.

    Raises UserError where there are no runs, or none has a setting that is asked for.
    """
    runs = _found(folder, by)
    sheet, sound = attribution(runs, told_apart(runs, by))
    return FORMATS[format](sheet), sound


def _found(folder: Path, by: Sequence[str]) -> list[dict]:
    runs = rows(folder)
    if not runs:
        raise UserError(f"No run under {folder} has a metrics.json: run the evaluate stage of one first.")
    settings = {name for run in runs for name in run if "/" not in name} - {"run"}
    for name in (name for name in by if name not in settings.union(BY)):
        near = get_close_matches(name, sorted(settings), n=1)
        hint = f"Did you mean {near[0]}?" if near else "Name a group, as method, or a dotted setting, as sampler.steps."
        raise UserError(f"No run has the setting {name}, which rows are to be told apart by. {hint}")
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(prog="unlearn-table", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="runs at any depth below it")
    parser.add_argument("--metrics", nargs="+", help="names or patterns, as in 'retention/*'; all of them if not given")
    parser.add_argument("--by", nargs="+", default=BY, help="what tells rows apart: groups or dotted settings")
    parser.add_argument("--published", type=Path, help="a paper's numbers, as experiments/*/published.csv")
    parser.add_argument("--format", choices=FORMATS, default="markdown")
    parser.add_argument(
        "--check",
        action="store_true",
        help="instead, tell which commit made each row; the exit status is 1 if any row mixes commits, those of stored "
        "pictures and evaluations too, was made from a tree with uncommitted changes, or does not say",
    )
    asked = vars(parser.parse_args())
    try:
        if asked.pop("check"):
            text, sound = check(asked["folder"], asked["by"], asked["format"])
        else:
            text, sound = table(**asked), True
    except UserError as error:
        raise SystemExit(str(error)) from None
    print(text, end="")
    sys.exit(not sound)


if __name__ == "__main__":
    main()

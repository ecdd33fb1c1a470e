"""Many runs as one page: which method forgets most and harms least, and does it look right?

unlearn-report outputs
unlearn-report outputs/runs/sd14 --to sd14.html

The page is a single file without network; without its script it is a static page. Its numbers are those of the table.
"""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from unlearning.concepts import RETAIN
from unlearning.data import openmoji
from unlearning.errors import UserError
from unlearning.reporting import curves, gallery
from unlearning.reporting.column import decimals
from unlearning.reporting.embedding import render
from unlearning.reporting.gallery import Shot
from unlearning.reporting.grouping import OWN, group_of, grouped, told_apart
from unlearning.reporting.rows import UNEDITED, rows
from unlearning.reporting.scope import BEFORE, Line, Scope
from unlearning.reporting.sheet import BEST, Cell
from unlearning.store.files import write_atomically

COLUMNS = 8  # of pictures, besides the one before
SAMPLED = 3  # concepts whose pictures stand beside the plot of all of them
UNITS = {
    "cost/seconds": ((1, "s"), (60, "min"), (3600, "h")),
    "cost/peak_memory": ((1e6, "MB"), (1e9, "GB")),
    "cost/artefact_bytes": ((1, "B"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB")),
}

# --- everything that may be compared ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """The runs of one model and dataset, in scopes: all concepts, if there are several, then each of them."""

    model: str
    dataset: str
    scopes: Sequence[Scope]
    panels: Sequence[curves.Panel]
    silent: Sequence[str]
    columns: Sequence[Line]  # of pictures
    explicit: bool  # whether its pictures may be

    @property
    def shots(self) -> list[Shot]:
        """Some of each kind: what stands beside the plot of all concepts."""
        single = [scope.shots for scope in self.scopes if scope.concept and scope.shots]
        kept = [shot for shots in single for shot in shots if shot.role == RETAIN]
        return [*(shots[0] for shots in single[:SAMPLED]), *kept[:1]]


def _before(runs: Sequence[Mapping], by: Sequence[str]) -> Iterator[dict]:
    """What the runs measured of the unedited model, as runs of it; of the concepts that have no run of it."""
    seen, told_already = set(), {run.get("concept") for run in runs if run.get("method") == UNEDITED}
    for run in (run for run in runs if run.get("concept") not in told_already):
        known = {k: v for k, v in run.items() if k.endswith("/better") or ("/" not in k and group_of(k) not in OWN)}
        same = (known.get("concept"), known.get("seed"), *(known.get(name) for name in by))
        if same not in seen:
            seen.add(same)
            told = {k.removeprefix("base/"): v for k, v in run.items() if k.startswith("base/")}
            if told:
                yield {**known, **told, "method": UNEDITED, "run": None}


def _worlds(runs: Sequence[Mapping]) -> Iterator[World]:
    groups = grouped(runs, ("model", "dataset"))
    concepts = sum(len({str(run.get("concept")) for run in group}) for group in groups.values())
    for (model, dataset), group in groups.items():
        by = told_apart(group, ("method",))
        own = list(grouped(group, ("concept",)).values())
        everything = [*group, *_before(group, by)]
        whole = Scope("", everything, by)
        scopes = [whole] if len(own) > 1 else []
        columns = _columns(whole)
        count = max(1, gallery.PICTURES // (concepts * (1 + len(columns))))
        room = gallery.PICTURES // (1 + len(columns)) // len(groups)
        for i, part in enumerate(own):
            made = grouped(part, by)
            shown = {line.key: made[line.key] for line in columns if line.key in made}
            shots = gallery.shots(shown, count if i < room else 0)
            scopes.append(Scope(str(part[0].get("concept")), [*part, *_before(part, by)], by, shots))
        found, silent = curves.panels(group)
        explicit = any("nudenet" in name for run in group for name in run)
        yield World(str(model), str(dataset), scopes, found, silent, columns, explicit)


def _columns(scope: Scope) -> list[Line]:
    """The rows whose pictures are shown: those of the front first, and in the order of the table."""
    edited = [line for line in scope.lines if line.method != UNEDITED]
    front = {point.label for point in scope.plot.front} if scope.plot else set()
    chosen = sorted(edited, key=lambda line: line.label not in front)[:COLUMNS]
    return [line for line in edited if line in chosen]


# --- the page ---------------------------------------------------------------------------------------------------------


def quantity(metric: str, cell: Cell) -> str:
    """A cell's text; a cost with its unit: "57.8 ± 0.5 s", "1.44 GB"."""
    mean, error = cell.values[:2]
    if mean is None or metric not in UNITS:
        return cell.text
    size, unit = next(((s, u) for s, u in reversed(UNITS[metric]) if mean >= s), UNITS[metric][0])
    shown = [f"{value / size:,.{decimals([mean / size])}f}" for value in (mean, error or 0.0)]
    mean, error = (text if float(text.replace(",", "")) else "0" for text in shown)
    return f"{mean} {unit}" if error == "0" else f"{mean} ± {error} {unit}"


def _hues(methods: Iterable[str]) -> dict[str, int]:
    """A hue for each, neighbours far apart."""
    return {method: (255 + round(i * 137.508)) % 360 for i, method in enumerate(methods)}


def _title(methods: Sequence[str], concepts: Sequence[str]) -> str:
    edited = [method for method in methods if method != UNEDITED]
    what = concepts[0] if len(concepts) == 1 else f"{len(concepts)} concepts"
    how = f"by {edited[0]}" if len(edited) == 1 else f"{len(edited)} ways"
    return f"{what}, erased {how}" if edited else f"{what}, nothing erased"


def page(folder: Path, to: Path | None = None) -> Path:
    """Writes a page about every finished run under `folder`: `to`, or report.html in it. Returns where.

    Raises UserError where there are no runs, or the folder is itself a run.
    """
    folder = Path(folder)
    to = Path(to) if to else folder / "report.html"
    runs = rows(folder)
    if not runs:
        raise UserError(f"No run under {folder} has a metrics.json: run the evaluate stage of one first.")
    if runs[0]["run"] == folder:
        raise UserError(f"{folder} is a run, and its report.html its own page. Name a folder above it.")
    worlds = list(_worlds(runs))
    methods = {line.method: None for world in worlds for scope in world.scopes for line in scope.lines}
    methods = sorted(methods, key=lambda method: (method != UNEDITED, str(method)))
    told = {name: list(dict.fromkeys(str(run.get(name)) for run in runs)) for name in ("model", "dataset", "concept")}
    text = render(
        "page.html.j2",
        title=_title(methods, told["concept"]),
        worlds=worlds,
        runs=runs,
        methods=methods,
        hues=_hues(m for m in methods if m != UNEDITED),
        seeds=len({run.get("seed") for run in runs}),
        told=told,
        picture=cache(gallery.picture),  # some are shown twice
        quantity=quantity,
        best=BEST,
        unedited=UNEDITED,
        before=BEFORE,
        licence=openmoji.LICENCE if any(str(model).startswith("emoji") for model in told["model"]) else "",
    )
    to.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(to, text)
    return to


def main() -> None:
    parser = argparse.ArgumentParser(prog="unlearn-report", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="runs at any depth below it")
    parser.add_argument("--to", type=Path, help="the page's file; report.html in the folder if not given")
    try:
        print(page(**vars(parser.parse_args())))
    except UserError as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()

"""Speed and memory at the size of Stable Diffusion 1.4 and of larger models: make gpu, or python -m experiments.gpu

Each row measures ours and the published way in one process, by turns (A B A B ...), and is written to disk at once. A
rerun goes on with the rows that are missing.
"""

import argparse
import json
import logging
import re
import statistics
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch

from experiments.gpu.bench import Bench, Row
from experiments.gpu.rows import ROWS
from unlearning.store.files import write_atomically
from unlearning.tracking.provenance import hardware

MINUTES = 8.5  # for the whole table; a row whose estimate does not fit is left to the next run


def measured(row: Row, bench: Bench) -> dict[str, Any]:
    """The row's numbers: seconds for each unit, their ratio, peak memory in bytes."""
    start = time.perf_counter()
    torch.manual_seed(0)
    sides = row.sides(bench)
    before = bench.allocated()
    ours = sides.ours()
    peak_ours = bench.with_peak(ours, 0)
    held = bench.allocated() - before
    theirs = sides.theirs()
    peak_theirs = bench.with_peak(theirs, held)
    ours_s: list[float] = []
    theirs_s: list[float] = []
    while len(ours_s) < bench.size.turns and (len(ours_s) < 2 or time.perf_counter() < start + row.seconds):
        for run, seconds in ((ours, ours_s), (theirs, theirs_s)):
            torch.manual_seed(len(seconds))
            seconds.append(run())
    ratios = [b / a for a, b in zip(ours_s, theirs_s, strict=True)]
    mean = statistics.mean(ours_s)
    return {
        "unit": row.unit, "goal": row.goal, "n": len(ratios),
        "ours_s": mean, "published_s": statistics.mean(theirs_s),
        "ratio": statistics.mean(ratios), "ratio_se": statistics.stdev(ratios) / len(ratios) ** 0.5,
        "ours_bytes": peak_ours, "published_bytes": peak_theirs,
        "utilisation": sides.flops / mean / bench.peak_flops if sides.flops else None,
        "took_s": time.perf_counter() - start,
    }  # fmt: skip


COLUMNS = (
    "what", "unit", "ours (s)", "published (s)", "× faster", "± SE", "N", "goal", "ours (GiB)", "published (GiB)",
    "ours / published", "FLOPs (%)",
)  # fmt: skip


def table(results: dict[str, Any]) -> str:
    """Markdown."""

    def line(name: str, row: dict[str, Any]) -> str:
        if "error" in row:
            return f"| {name} | failed: {row['error']} |"
        memory = [row["ours_bytes"] / 2**30, row["published_bytes"] / 2**30]
        numbers = [row["ours_s"], row["published_s"], row["ratio"], row["ratio_se"]]
        share = f"{100 * row['utilisation']:.3g}" if row["utilisation"] else ""
        cells = [name, row["unit"], *(f"{x:.3g}" for x in numbers), row["n"], row["goal"]]
        cells += [*(f"{x:.3g}" for x in memory), f"{memory[0] / memory[1]:.2f}", share]
        return f"| {' | '.join(map(str, cells))} |"

    machine = results["machine"]
    head = f"{machine['card']}; torch {machine['torch']}, diffusers {machine['diffusers']}"
    peak = f"{machine['peak_flops'] / 1e12:.3g} T operations a second in a bf16 matrix product"
    lines = [line(row.name, results["rows"][row.name]) for row in ROWS if row.name in results["rows"]]
    return "\n".join([f"{head}; {peak}.", "", f"| {' | '.join(COLUMNS)} |", f"|{' --- |' * len(COLUMNS)}", *lines, ""])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures the rows that are missing; returns how many failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the results")
    parser.add_argument("--only", default="", help="rows whose names have this text")
    parser.add_argument("--minutes", type=float, default=MINUTES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny models: whether it runs, not how fast")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    bench = Bench(options.device, options.tiny)
    card = torch.cuda.get_device_name() if options.device == "cuda" else str(hardware()["cpu"])
    file = options.out / f"{'tiny-' * options.tiny}{re.sub(r'[^a-zA-Z0-9]+', '-', card).strip('-')}.json"
    results = json.loads(file.read_text()) if file.exists() else {"rows": {}}
    results["machine"] = {"card": card, "torch": torch.__version__, "diffusers": diffusers.__version__,
                          "peak_flops": bench.peak_flops}  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    left: list[str] = []
    for row in (row for row in ROWS if options.only in row.name):
        if "error" not in results["rows"].get(row.name, {"error": "missing"}):
            continue
        if time.perf_counter() - start + row.seconds > 60 * options.minutes:
            left.append(row.name)
            continue
        try:
            results["rows"][row.name] = measured(row, bench)
        except Exception as error:  # the other rows are measured nevertheless
            traceback.print_exc()
            results["rows"][row.name] = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        bench.release()
        write_atomically(file, json.dumps(results, indent=1) + "\n")
        write_atomically(file.with_suffix(".md"), table(results))
        print(f"{time.perf_counter() - start:5.0f} s  {row.name}", flush=True)
    print(f"\n{table(results)}\n{file}")
    if left:
        print(f"{len(left)} rows were left out for want of time; the same command goes on with them: {', '.join(left)}")
    return sum("error" in row for row in results["rows"].values())


def quieten() -> None:
    for name in ("pytorch_lightning", "lightning_fabric", "transformers", "unlearning"):
        logging.getLogger(name).setLevel(logging.ERROR)
    diffusers.utils.logging.disable_progress_bar()
    diffusers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore")

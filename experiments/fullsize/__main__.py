"""One step of every method and attack at full size, with random weights, and its memory: python -m experiments.fullsize

Rows that are missing are measured, and each is written at once. So is one that fails, with the reason; it is measured
again when --only names it. The table is written into README.md.
"""

import argparse
import gc
import json
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from experiments.fullsize.memory import Counted
from experiments.fullsize.steps import method, steps
from experiments.gpu import architectures
from experiments.gpu.table import quieten
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.store.files import write_atomically
from unlearning.tracking.provenance import hardware

RESULTS, README = (Path(__file__).parent / name for name in ("results.json", "README.md"))
SIDE = 32  # of the latents where nothing else is said, to save time
LARGER = "SD1.4 at 64²"
DEPTHS = {  # the blocks of the larger models, which are built with few of them
    "SDXL": {"middle": 2, "last": 10},
    "SD3-medium": {"blocks": 24},
    "FLUX.1-dev": {"double": 19, "single": 38},
}
SOME = {  # of the methods
    LARGER: ("esd_x", "unguide", "uce"),
    "SDXL": ("esd_x", "unguide", "uce"),
    "SD3-medium": ("esd_x", "uce", "eraseanything"),
    "FLUX.1-dev": ("esd_x", "uce", "eraseanything"),
}
Numbers = dict[str, Any]  # numbers, or {"failed": why}
PARTS = ("kept", "gradients", "optimizer", "passing")


def names() -> list[str]:
    """The rows, "MODEL/method/NAME" and the like."""
    small = [f"SD1.4/{name}" for name in steps(StableDiffusion)]
    chosen = [f"{model}/{kind}method/{name}" for model in SOME for name in SOME[model]
              for kind in ("", "published/") if model == LARGER or not kind]  # fmt: skip
    return [*small, *sorted(chosen, key=lambda name: name.startswith(LARGER)), f"{LARGER}/image"]


@lru_cache(maxsize=1)
def whole(model: str) -> DiffusionModel:
    """SD1.4, with latents of the row's side."""
    return sized(architectures.diffusion("SD1.4", device="cpu"), model)


def sized(built: DiffusionModel, model: str) -> DiffusionModel:
    built.latent_size = None if model == LARGER else (SIDE, SIDE)
    return built


def measured(row: str) -> Numbers:
    """Bytes and seconds of a row."""
    model, _, name = row.partition("/")
    torch.manual_seed(0)
    if model not in DEPTHS:
        return asdict(steps(StableDiffusion)[name](whole(model)))
    step = partial(method, name.partition("/")[2])
    return extrapolated(
        lambda **depth: step(sized(architectures.diffusion(model, device="cpu", **depth), model)), DEPTHS[model]
    )


def extrapolated(step: Callable[..., Counted], depth: Mapping[str, int]) -> Numbers:
    """What a step needs with all blocks, from it with one block of each kind and with two of one kind: every block of
    a kind adds the same.

    Args:
        step: Takes the numbers of blocks.
        depth: The published ones.
    """
    once = dict.fromkeys(depth, 1)
    least = asdict(step(**once))
    more = {kind: asdict(step(**once | {kind: 2})) for kind in depth}

    def with_all(column: str) -> float:
        return least[column] + sum((n - 1) * (more[kind][column] - least[column]) for kind, n in depth.items())

    return {column: with_all(column) for column in PARTS}


def table(rows: Mapping[str, Numbers]) -> str:
    """Markdown; GiB. A published loop stands beside ours."""
    head = ["what", *PARTS, "sum", "published", "ours / published", "seconds"]

    def total(row: Numbers) -> float:
        return sum(row[part] for part in PARTS)

    def line(name: str, row: Numbers) -> str:
        if "failed" in row:
            return f"| {name} | {row['failed']} |{' |' * (len(head) - 2)}"
        theirs = rows.get(name.replace("/", "/published/", 1))
        theirs = None if theirs and "failed" in theirs else theirs
        beside = [f"{total(theirs) / 2**30:.2f}", f"{total(row) / total(theirs):.2f}"] if theirs else ["", ""]
        cells = [name, *(f"{row[part] / 2**30:.2f}" for part in PARTS), f"{total(row) / 2**30:.2f}", *beside]
        cells.append(f"{row['seconds']:.0f}" if "seconds" in row else "")
        return f"| {' | '.join(cells)} |"

    lines = [line(name, row) for name, row in rows.items() if "/published/" not in name]
    return "\n".join([f"| {' | '.join(head)} |", f"|{' --- |' * len(head)}", *lines, ""])


def why(error: Exception) -> str:
    """The reason of a failure, in a line that can stand in a table."""
    if "can't allocate memory" in str(error):
        free = resource.getrlimit(resource.RLIMIT_DATA)[0] / 2**30
        return f"not in {free:.0f} GiB"
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}".replace("|", "/")


def limit_memory() -> None:
    """An allocation that this machine has no memory for, nor swap, fails, instead of another process."""
    if (status := Path("/proc/meminfo")).exists():
        sizes = dict(line.split(":") for line in status.read_text().splitlines())
        free = sum(1024 * int(sizes[kind].split()[0]) for kind in ("MemAvailable", "SwapFree"))
        resource.setrlimit(resource.RLIMIT_DATA, (int(0.95 * free), resource.RLIM_INFINITY))


def main() -> int:
    """Measures the rows that are missing; returns how many failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="rows whose names have this text")
    options = parser.parse_args()
    limit_memory()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"rows": {}}
    results["machine"] = f"{hardware()['cpu']}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    failed = 0
    for name in names():
        known = results["rows"].get(name)
        if options.only not in name or (known and not ("failed" in known and options.only)):
            continue
        start = time.perf_counter()
        try:
            results["rows"][name] = measured(name)
        except Exception as error:  # the other rows are measured nevertheless
            failed += 1
            print(f"{name} failed: {type(error).__name__}: {error}", file=sys.stderr)
            results["rows"][name] = {"failed": why(error)}
        finally:
            gc.collect()
        results["rows"] = {row: results["rows"][row] for row in names() if row in results["rows"]}
        write_atomically(RESULTS, json.dumps(results, indent=1) + "\n")
        print(f"{time.perf_counter() - start:5.0f} s  {name}", flush=True)
    start, end = "<!-- table -->", "<!-- /table -->"
    before, rest = README.read_text().split(start)
    text = f"{start}\n{results['machine']}; GiB.\n\n{table(results['rows'])}{end}"
    write_atomically(README, f"{before}{text}{rest.split(end)[1]}")
    return failed


if __name__ == "__main__":
    quieten()
    sys.exit(1 if main() else 0)

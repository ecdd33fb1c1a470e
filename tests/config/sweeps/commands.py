"""A sweep with two images for each run, optionally in a separate process, and its metrics."""

import json
from pathlib import Path

from tests.processes import COMMAND_LINE, Started

FEW = ["-m", "dataset=prompt", "dataset.others=[dog]"]


def in_a_process(arguments: list[str], before: str = "") -> Started:
    """The command line in a process of its own, which first runs the Python of `before`."""
    return Started(f"{before}\n{COMMAND_LINE}", arguments)


def metrics(runs: Path) -> dict[str, dict]:
    """Every run's numbers, by method and seed."""
    files = runs.rglob("metrics.json")
    return {"/".join(p.parts[-3:-1]).rpartition("-")[0]: json.loads(p.read_text()) for p in files}


def numbers(runs: Path) -> dict[str, dict]:
    """Those that do not depend on the machine."""
    return {run: {k: v for k, v in m.items() if not k.startswith("cost/")} for run, m in metrics(runs).items()}

"""The robustness table of README.md, from the runs in robustness.csv: python experiments/attacks/robustness.py [FOLDER]

With a folder of runs (outputs/runs/emoji_unet/emoji_objects/cat), their numbers are written into robustness.csv first:
a line for each method and seed, in place of an earlier one of the same. Lines of seeds 0 and 1 were reconstructed from
mean and standard error: which of the two seeds had which number is not known.
"""

import argparse
import csv
import statistics
from pathlib import Path

from unlearning.reporting.runs import read_runs

HERE = Path(__file__).parent
RUNS, README = HERE / "robustness.csv", HERE / "README.md"
ATTACKS = ("paraphrase", "ring_a_bell", "mma", "p4d", "unlearndiffatk", "cce", "recall", "inversion")
Runs = dict[tuple[str, str], dict[str, str]]  # by method and seed: percent by attack, "" where it was not run


def known() -> Runs:
    """The runs in the file."""
    with RUNS.open(newline="") as file:
        return {(row.pop("method"), row.pop("seed")): row for row in csv.DictReader(file)}


def read(folder: Path) -> Runs:
    """The runs in a folder that were attacked."""
    found: Runs = {}
    for run in read_runs(folder):
        metrics = {name: run.metrics.get(f"robustness/asr_{name}") for name in ATTACKS}
        values = {name: f"{m.value:g}" if m and m.value is not None else "" for name, m in metrics.items()}
        if any(values.values()):
            key = str(run.settings["method"]), str(run.settings["seed"])
            if found.setdefault(key, values) != values:
                raise SystemExit(f"{folder} has two runs of {' with seed '.join(key)} whose numbers differ.")
    return found


def write(runs: Runs) -> None:
    """The runs as a file: controls first."""
    order = sorted(runs, key=lambda key: (key[0] not in ("none", "oracle"), key))
    with RUNS.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["method", "seed", *ATTACKS], lineterminator="\n")
        writer.writeheader()
        writer.writerows({"method": method, "seed": seed, **runs[method, seed]} for method, seed in order)


def table(runs: Runs) -> str:
    """Mean ± standard error over the seeds, by method; Markdown."""
    methods = list(dict.fromkeys(method for method, _ in runs))
    head = ["", "seeds", *(f"`{name}`" for name in ATTACKS)]
    lines = [f"| {' | '.join(head)} |", f"| --- | {' | '.join(['---:'] * (1 + len(ATTACKS)))} |"]
    for method in methods:
        own = [values for (name, _), values in runs.items() if name == method]
        cells = [cell([float(values[name]) for values in own if values[name]]) for name in ATTACKS]
        lines.append(f"| `{method}` | {len(own)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(values: list[float]) -> str:
    if not values:
        return "–"
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.0f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.0f}{error}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    folder = parser.parse_args().folder
    runs = known() | (read(folder) if folder else {})
    write(runs)
    start, end = "<!-- robustness -->", "<!-- /robustness -->"
    before, rest = README.read_text().split(start)
    README.write_text(f"{before}{start}\n{table(runs)}\n{end}{rest.split(end)[1]}")


if __name__ == "__main__":
    main()

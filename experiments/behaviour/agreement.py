"""Whether methods rank here as they do in papers: python experiments/behaviour/agreement.py outputs/runs

For each published board, Spearman's rank correlation between its numbers and those of finished runs, over the methods
that both have. A method's number is the mean over concepts and seeds. The interval is the middle 95 % of the
correlations of 10,000 resamples of the methods; with few methods it is wide, and with fewer than four nothing is said.
"""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
from scipy.stats import rankdata, spearmanr
from tabulate import tabulate

from unlearning.reporting.published import read_published
from unlearning.reporting.runs import FinishedRun, read_runs

EXPERIMENTS = Path(__file__).parents[1]
SAME = {"esd": "esd_x"}  # boards that do not say which of ESD's variants they compare
FEWEST = 4


@dataclass(frozen=True)
class Board:
    """A paper's table.

    Args:
        name: Of the paper.
        file: Its numbers, below experiments/.
        metrics: Ours, by the paper's.
    """

    name: str
    file: str
    metrics: Mapping[str, str]


OBJECTS = ("efficacy/acc_e", "efficacy/acc_g", "retention/acc_s")
ATTACKS = [f"robustness/asr_{a}" for a in ("mma", "p4d", "unlearndiffatk", "ring_a_bell", "cce", "inversion")]
PROBES = [f"robustness/asr_{a}" for a in ("completion", "inpainting", "noise", "classifier_guidance", "cce")]
BOARDS = (
    Board("MACE and UnGuide, objects", "unguide/published.csv", {name: name for name in OBJECTS}),
    Board("HUB, mean of 33 concepts", "behaviour/published.csv",
          {name: name for name in ("efficacy/acc_e", "retention/acc_s", "fidelity/fid", "robustness/asr_ring_a_bell")}),
    Board("UnlearnCanvas, objects", "unlearncanvas/published_objects.csv",
          {"efficacy/ua": "efficacy/acc_e", "retention/ira": "retention/acc_s"}),
    Board("TINA", "attacks/published_tina.csv", {name: name for name in ATTACKS}),
    Board("When are concepts erased?", "attacks/published_probes.csv", {name: name for name in PROBES}),
)  # fmt: skip
UPSIDE_DOWN = {"efficacy/ua"}  # a share of images without the concept, where ours is one of images with it


def published(board: Board, metric: str) -> dict[str, float]:
    """The board's number of each method: its own average, or the mean of its concepts."""
    values: dict[str, list[float]] = {}
    for (method, _, name), number in read_published(EXPERIMENTS / board.file).items():
        if name == metric:
            values.setdefault(SAME.get(method, method), []).append(number.value)
    sign = -1 if metric in UPSIDE_DOWN else 1
    return {method: sign * mean(numbers) for method, numbers in values.items()}


def measured(runs: list[FinishedRun], metric: str) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for run in runs:
        if (value := run.value(metric)) is not None:
            values.setdefault(str(run["method"]), []).append(value)
    return {method: mean(numbers) for method, numbers in values.items()}


def interval(theirs: np.ndarray, ours: np.ndarray, draws: int = 10_000) -> tuple[float, float]:
    """The middle 95 % of the correlations of resampled methods, without those in which all are equal."""
    rows = np.random.default_rng(0).integers(len(ours), size=(draws, len(ours)))
    a, b = (rankdata(values[rows], axis=1) for values in (theirs, ours))
    a, b = (ranks - ranks.mean(1, keepdims=True) for ranks in (a, b))
    norms = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    correlations = (a * b).sum(1)[norms > 0] / norms[norms > 0]
    low, high = np.percentile(correlations, (2.5, 97.5))
    return float(low), float(high)


def compared(board: Board, theirs_name: str, runs: list[FinishedRun]) -> list[str]:
    """A line of the table."""
    ours_name = board.metrics[theirs_name]
    theirs, ours = published(board, theirs_name), measured(runs, ours_name)
    methods = sorted(theirs.keys() & ours.keys())
    line = [board.name, theirs_name, ours_name, str(len(methods))]
    x, y = (np.array([numbers[m] for m in methods]) for numbers in (theirs, ours))
    if len(methods) < FEWEST or len({*x}) < 2 or len({*y}) < 2:
        return [*line, "", "", ", ".join(methods)]
    rho, (low, high) = float(spearmanr(x, y).statistic), interval(x, y)
    gaps = rankdata(x) - rankdata(y)
    farthest = [f"{methods[i]} ({gaps[i]:+.0f})" for i in np.argsort(-abs(gaps))[:2] if abs(gaps[i]) >= 1]
    return [*line, f"{rho:.2f}", f"{low:.2f} to {high:.2f}", ", ".join(farthest)]


def main(folder: Path, model: str) -> None:
    runs = [run for run in read_runs(folder) if run["model"] == model]
    head = ("board", "published", "ours", "methods", "Spearman", "95 %", "largest differences of rank")
    lines = [compared(board, metric, runs) for board in BOARDS for metric in board.metrics]
    print(tabulate(lines, head, tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="finished runs, at any depth")
    parser.add_argument("--model", default="emoji_unet", help="which model's runs, by its name in conf/model")
    main(**vars(parser.parse_args()))

"""Measures what a sweep saves, what a kill costs, and what two sweeps at once do to one store.

python experiments/sweeps/measure.py                            # of experiment=everything: a day on two cores
python experiments/sweeps/measure.py --launcher joblib --only sweep alone --sample 10 # a tenth of the runs alone: hours
python experiments/sweeps/measure.py -o method=none,uce,negative_prompt -o concept=cat -o sampler.steps=4 \
    -o dataset.images_per_prompt=1                     # the same questions of a small sweep: minutes

Everything runs by the command line, in processes of its own and in a temporary folder.
"""

import argparse
import itertools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from PIL import Image

from unlearning.__main__ import CONF
from unlearning.reporting.table import table

METRICS = ("efficacy/*", "retention/*", "summary/*", "fidelity/*")  # those that do not depend on the machine
NAMES = ("sweep", "alone", "kill", "two")


class Place:
    """A folder of runs, a store, and the commands that fill them."""

    def __init__(self, folder: Path, options: argparse.Namespace, store: Path | None = None):
        self.runs, self.store, self.options = folder / "runs", store or folder / "store", options
        folder.mkdir(parents=True, exist_ok=True)
        self.log = folder / "log"

    def start(self, *overrides: str) -> subprocess.Popen:
        command = [
            sys.executable,
            "-m",
            "unlearning",
            *overrides,
            f"paths.runs={self.runs}",
            f"paths.store={self.store}",
        ]
        with self.log.open("a") as log:
            return subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def sweep(self) -> subprocess.Popen:
        launcher = [f"hydra/launcher={self.options.launcher}"] if self.options.launcher != "basic" else []
        return self.start("-m", f"experiment={self.options.experiment}", *launcher, *self.options.override)

    def end(self, process: subprocess.Popen) -> None:
        if process.wait():
            sys.exit(f"A command failed. The end of {self.log}:\n{self.log.read_text()[-2000:]}")

    def show(self, name: str) -> None:
        """Makes the table or the page, as a user does; the output goes to the log."""
        with self.log.open("a") as log:
            subprocess.run([sys.executable, "-m", f"unlearning.reporting.{name}", self.runs], stdout=log, stderr=log)

    @staticmethod
    def gone(process: subprocess.Popen) -> bool:
        """Whether a killed command and all of its workers have ended within ten seconds."""
        with suppress(ProcessLookupError):
            for _ in range(100):
                os.killpg(process.pid, 0)  # an error where the group is empty
                time.sleep(0.1)
            return False
        return True

    def finished(self) -> dict[Path, int]:
        """Finished runs, with the time at which each report was written."""
        return {p.parent: (p.parent / "report.html").stat().st_mtime_ns for p in self.runs.rglob(".finished")}

    def pictures(self) -> dict[Path, int]:
        return {p: p.stat().st_mtime_ns for p in self.store.rglob("*.png")}

    def spent(self, stage: str, cost: str) -> float:
        """The sum of a cost of a stage over all runs: "fit", "seconds"; "generate", "denoiser_evaluations"."""
        costs = [json.loads(p.read_text()) for p in self.runs.rglob("cost.json")]
        return sum(spent[cost] for c in costs for name, spent in c.items() if name.startswith(stage))

    def table(self) -> str:
        return table(self.runs, metrics=METRICS)


def jobs(options: argparse.Namespace) -> list[list[str]]:
    """The overrides of each of the sweep's runs."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("config", [f"experiment={options.experiment}"], return_hydra_config=True)
        params = [f"{key}={value}" for key, value in composed.hydra.sweeper.params.items()]
        parser = OverridesParser.create(config_loader=GlobalHydra.instance().config_loader())
        swept = {o.get_key_element(): o for o in parser.parse_overrides([*params, *options.override])}
        each = [
            [f"{key}={value}" for value in o.sweep_string_iterator()] if o.is_sweep_override() else [o.input_line]
            for key, o in swept.items()
        ]
    return [list(words) for words in itertools.product(*each)]


def whole_sweep(root: Path, options: argparse.Namespace) -> Place:
    """A sweep that was not interrupted."""
    place = Place(root / "whole", options)
    if not place.finished():
        place.end(place.sweep())
    return place


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure_sweep(root: Path, options: argparse.Namespace, runs: Sequence[Sequence[str]]) -> None:
    """Times one sweep, its table and page, and the same sweep again."""
    place = Place(root / "whole", options)
    seconds = timed(lambda: place.sweep().wait())
    failed = [str(p.parent.relative_to(place.runs)) for p in place.runs.rglob("failed.json")]
    shown = timed(lambda: (place.show("table"), place.show("runs_page")))
    again = timed(lambda: place.sweep().wait())
    print(f"sweep: {len(runs)} runs in {seconds:.0f} s; table and page {shown:.1f} s; the sweep again {again:.1f} s")
    print(f"sweep: their fits took {place.spent('fit', 'seconds'):.0f} s, added up over its processes")
    if failed:
        print(f"sweep: {len(failed)} FAILED: {', '.join(failed)}")


def measure_alone(root: Path, options: argparse.Namespace, runs: Sequence[Sequence[str]]) -> None:
    """Times the sweep's runs one at a time, each with a process and a store of its own, or an even sample of them."""
    sample = [runs[i * len(runs) // options.sample] for i in range(options.sample)] if options.sample else runs
    total = 0.0
    for i, overrides in enumerate(sample):
        single = Place(root / "single" / str(i), options)
        total += (seconds := timed(lambda single=single, overrides=overrides: single.end(single.start(*overrides))))
        print(f"alone: {' '.join(overrides)}: {seconds:.0f} s", flush=True)
    every = f"; at this rate {len(runs)} take {total / len(sample) * len(runs):.0f} s" if options.sample else ""
    print(f"alone: {len(sample)} runs, one at a time, {total:.0f} s{every}")


def measure_kill(root: Path, options: argparse.Namespace, runs: Sequence[Sequence[str]]) -> None:
    """Kills a sweep when half of its runs are done, and starts it again."""
    place, whole = Place(root / "killed", options), whole_sweep(root, options)
    process = place.sweep()
    while len(place.finished()) < len(runs) / 2 and process.poll() is None:
        time.sleep(0.05)
    process.kill()  # only this process: its workers have to notice it
    process.wait()
    gone = place.gone(process)
    finished, pictures = place.finished(), place.pictures()
    place.end(place.sweep())
    same = place.table() == whole.table()
    rerun = sum(place.finished()[run] != when for run, when in finished.items())
    redrawn = sum(place.pictures()[path] != when for path, when in pictures.items())
    print(f"kill: with {len(finished)} of {len(runs)} runs and {len(pictures)} pictures done; then again: "
          f"{rerun} of these runs done twice, {redrawn} of these pictures drawn twice")  # fmt: skip
    print(f"kill: {'no worker was' if gone else 'WORKERS WERE'} left ten seconds later")
    print(f"kill: the table is {'identical' if same else 'ANOTHER'} to that of a sweep that was not killed")


def measure_two(root: Path, options: argparse.Namespace, runs: Sequence[Sequence[str]]) -> None:
    """Runs the same sweep twice at once, with two folders of runs and one store."""
    whole = whole_sweep(root, options)
    both = [Place(root / name, options, root / "shared") for name in ("one", "other")]
    for place, process in [(place, place.sweep()) for place in both]:
        place.end(process)
    there, corrupt = both[0].pictures(), 0
    for path in there:
        try:
            Image.open(path).load()
        except (OSError, SyntaxError):
            corrupt += 1
    left = len(list((root / "shared").rglob("*.partial")))
    spent, needed = (sum(p.spent("generate", "denoiser_evaluations") for p in some) for some in (both, [whole]))
    same = both[0].table() == both[1].table() == whole.table()
    print(f"two: {len(there)} pictures, {corrupt} corrupt, {left} half written")
    print(f"two: {spent} denoiser evaluations drew them; one sweep alone needs {needed}")
    print(f"two: the tables are {'identical' if same else 'NOT identical'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="everything")
    parser.add_argument("-o", "--override", action="append", default=[], help="of the sweep: method=none,uce")
    parser.add_argument("--launcher", default="basic", help="hydra/launcher of the sweeps: joblib, ...")
    parser.add_argument("--sample", type=int, help="how many runs to make alone; by default all of them")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    options = parser.parse_args()
    options.override += ["logger=csv"]
    runs = jobs(options)
    print("$", shlex.join(["python", *sys.argv]), flush=True)
    with tempfile.TemporaryDirectory(prefix="sweeps-") as folder:
        for name in options.only:
            globals()[f"measure_{name}"](Path(folder), options, runs)
            sys.stdout.flush()


if __name__ == "__main__":
    main()

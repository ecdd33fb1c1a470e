"""Measures the table and the page of 100,000 manifest rows: seconds and peak memory of the two commands.

python experiments/sweeps/scale.py                           # runs as the embedded world leaves them by default
python experiments/sweeps/scale.py --images-per-prompt 2     # as many rows of five times as many runs
"""

import argparse
import csv
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import cycle, product
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict
from PIL import Image

from unlearning.__main__ import CONF
from unlearning.data.objects import emoji_objects
from unlearning.data.openmoji import CIFAR10, picture, rng_of
from unlearning.store.manifest import ManifestRow, manifest, missing, write_manifest
from unlearning.store.metrics import Metric, write
from unlearning.tracking import provenance

METHODS = ("none", "negative_prompt", "uce", "esd_x", "esd_u", "unguide", "scrubber")
TRAINED = METHODS[3:]
METRICS = {
    "efficacy/acc_e": ("argmax of a judge", False),
    "efficacy/acc_g": ("argmax of a judge", False),
    "retention/acc_s": ("argmax of a judge", True),
    "summary/h_o": ("argmax of a judge", True),
    "fidelity/fid": ("clean-fid on a judge; images: retain 180 to 1000 real", False),
    "fidelity/clip_score": ("100 cos(image, prompt) by CLIP", True),
}
STEPS = 200  # of a training whose losses are logged
SECONDS, BYTES = 30, 2e9  # the target


def composed(method: str) -> tuple[str, str]:
    """The resolved.yaml and hydra.yaml of a run of this method."""
    cfg = compose("config", overrides=[f"method={method}"], return_hydra_config=True)
    hydra = OmegaConf.masked_copy(cfg, ["hydra"])
    with open_dict(cfg):
        del cfg.hydra
        cfg.title, cfg.paths.output_dir = method, "run"  # the only settings that a running Hydra resolves
    return OmegaConf.to_yaml(cfg, resolve=True), OmegaConf.to_yaml(hydra)


def pictures(count: int = 500) -> list[bytes]:
    """PNG files of the embedded world's objects."""
    files = []
    for i in range(count):
        buffer = io.BytesIO()
        Image.fromarray(picture(CIFAR10[i % 10], "color", rng_of("eval", 0, i)).image).save(buffer, "PNG")
        files.append(buffer.getvalue())
    return files


def numbers(rng: np.random.Generator) -> dict[str, Metric]:
    """The metrics of a run."""
    metrics = {
        name: Metric(100 * rng.random(), protocol, higher_is_better, 100 * rng.random(), protocol)
        for name, (protocol, higher_is_better) in METRICS.items()
    }
    return metrics | {"cost/seconds": Metric(60 * rng.random()), "cost/artefact_bytes": Metric(2_270_200)}


def losses(run: Path, rng: np.random.Generator) -> None:
    """Writes what the CSV logger writes in a training."""
    log = run / "logs" / "csv" / "version_0" / "metrics.csv"
    log.parent.mkdir(parents=True)
    with log.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["epoch", "step", "train/loss"])
        writer.writerows([0, step, rng.random()] for step in range(STEPS))


def make(root: Path, rows: int, images_per_prompt: int) -> tuple[int, int]:
    """Writes finished runs of each method and concept, with the seeds that `rows` manifest rows need, and their images.

    Returns:
        The number of runs, and the number of manifest rows.
    """
    record = {"begun": "", **provenance.repository(), "python": "", "packages": provenance.packages(), "hardware": {}}
    rng, drawn, runs, made = np.random.default_rng(0), cycle(pictures()), 0, 0
    with initialize_config_dir(str(CONF), version_base="1.3"):
        configs = {method: composed(method) for method in METHODS}

    def draw(manifest_rows: Sequence[ManifestRow]) -> None:
        manifest_rows[0].path.parent.mkdir(parents=True, exist_ok=True)
        for row in missing(manifest_rows):
            row.path.write_bytes(next(drawn))

    seed = -1
    while made < rows:
        seed += 1
        for concept, method in product(CIFAR10, METHODS):
            run = root / "runs" / "emoji_unet" / "emoji_objects" / concept / method / f"seed{seed}"
            (run / ".hydra").mkdir(parents=True)
            config, hydra = configs[method]
            config = config.replace("concept: cat\n", f"concept: {concept}\n")
            (run / ".hydra" / "resolved.yaml").write_text(config.replace("seed: 0\n", f"seed: {seed}\n", 1))
            (run / ".hydra" / "hydra.yaml").write_text(hydra)
            write(run / "metrics.json", numbers(rng))
            (run / provenance.FILE).write_text(json.dumps({"seed": seed, "processes": [record]}))
            if method in TRAINED:
                losses(run, rng)
            task = emoji_objects(concept, images_per_prompt=images_per_prompt)
            before = manifest(root / "store" / "images" / "base", task, seed)
            after = manifest(root / "store" / "images" / f"{method}-{concept}-{seed}", task, seed)
            draw(before)
            draw(after)
            write_manifest(run / "images" / "base.csv", before)
            after = [replace(row, base=base.path) for row, base in zip(after, before, strict=True)]
            write_manifest(run / "images" / "erased.csv", after)
            runs, made = runs + 1, made + len(before) + len(after)
    return runs, made


def measured(*command: str) -> tuple[float, float]:
    """The seconds that a command takes, and its peak resident memory in bytes.

    The kernel counts in this process's own size at the start of the command.
    """
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as stderr:
        process = subprocess.Popen([sys.executable, "-m", *command], stdout=subprocess.DEVNULL, stderr=stderr)
        _, _, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        stderr.seek(0)
        if errors := stderr.read():
            raise SystemExit(errors)
    return seconds, 1024 * usage.ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=100_000, help="of all manifests")
    parser.add_argument("--images-per-prompt", type=int, default=10, help="the fewer, the more runs")
    options = parser.parse_args()
    published = str(CONF.parent / "experiments" / "unguide" / "published.csv")
    with tempfile.TemporaryDirectory() as folder:
        runs, rows = make(Path(folder), options.rows, options.images_per_prompt)
        print(f"{runs:,} runs, {rows:,} manifest rows", flush=True)
        for name, module, *words in (
            ("unlearn-table", "table"),
            ("unlearn-table", "table", "--format", "latex"),
            ("unlearn-table", "table", "--format", "html"),
            ("unlearn-table", "table", "--by", "method", "--published", published),
            ("unlearn-table", "table", "--check"),
            ("unlearn-report", "runs_page"),
        ):
            seconds, memory = measured(f"unlearning.reporting.{module}", folder, *words)
            fits = "" if seconds < SECONDS and memory < BYTES else "  over the target"
            command = " ".join([name, "outputs", *words]).replace(published, "...")
            print(f"{seconds:6.1f} s  {memory / 1e6:6.0f} MB  {command}{fits}", flush=True)
        page = Path(folder) / "report.html"
        print(f"the page has {page.stat().st_size / 1e6:.1f} MB and {page.read_text().count('<img '):,} pictures")


if __name__ == "__main__":
    main()

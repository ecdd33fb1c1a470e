"""How long a table takes over many runs: seconds and peak memory of unlearn-table on made-up run folders.

python experiments/sweeps/scale.py
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf, open_dict

from unlearning import provenance
from unlearning.__main__ import CONF
from unlearning.data.openmoji import CIFAR10
from unlearning.images import Row, image_seed, write_manifest

METHODS = ("none", "negative_prompt", "uce", "esd_x", "esd_u", "unguide", "scrubber")
METRICS = {
    "efficacy/acc_e": ("argmax of a judge", False),
    "efficacy/acc_g": ("argmax of a judge", False),
    "retention/acc_s": ("argmax of a judge", True),
    "summary/h_o": ("argmax of a judge", True),
    "fidelity/fid": ("clean-fid on a judge; pictures: retain 180 to 1000 real", False),
    "fidelity/clip_score": ("100 cos(picture, prompt) by CLIP", True),
}
SECONDS, BYTES = 30, 2e9  # the target


def make(root: Path, runs: int, manifests: int, rows: int) -> None:
    """`runs` finished runs as the stages leave them, of which so many have manifests of so many rows in all."""
    record = {"begun": "", **provenance.repository(), "python": "", "packages": provenance.packages(), "hardware": {}}
    composed, rng = {}, np.random.default_rng(0)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for method in METHODS:
            cfg = compose("config", overrides=[f"method={method}"], return_hydra_config=True)
            hydra = OmegaConf.masked_copy(cfg, ["hydra"])
            with open_dict(cfg):
                del cfg.hydra
            composed[method] = OmegaConf.to_yaml(cfg), OmegaConf.to_yaml(hydra)
    for i in range(runs):
        method, concept, seed = METHODS[i % 7], CIFAR10[i // 7 % 10], i // 70
        run = root / "emoji_unet" / "emoji_objects" / concept / method / f"seed{seed}"
        (run / ".hydra").mkdir(parents=True)
        config, hydra = composed[method]
        config = config.replace("concept: cat\n", f"concept: {concept}\n", 1).replace("seed: 0\n", f"seed: {seed}\n", 1)
        (run / ".hydra" / "config.yaml").write_text(config)
        (run / ".hydra" / "hydra.yaml").write_text(hydra)
        metrics = {}
        for name, (protocol, higher) in METRICS.items():
            for prefix in ("base/", ""):
                metrics |= {prefix + name: 100 * rng.random(), f"{prefix}{name}/protocol": protocol}
            metrics[f"{name}/better"] = "higher" if higher else "lower"
        (run / "metrics.json").write_text(json.dumps(metrics, indent=2))
        (run / provenance.FILE).write_text(json.dumps({"seed": seed, "sittings": [record]}))
        for name in ("base", "erased") if i < manifests else ():
            asked = [
                Row(
                    root / name / f"{i}-{j}.png",
                    "a photo of the cat",
                    "erase",
                    {"object": "cat"},
                    image_seed(seed, name, j),
                )
                for j in range(rows // 2)
            ]
            write_manifest(run / "images" / f"{name}.csv", asked)


def measured(*command: str) -> tuple[float, float]:
    """Seconds of the command, and the largest resident size in bytes of any so far, this process's own at its start."""
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "unlearning.reporting.table", *command], capture_output=True, text=True
    )
    seconds = time.perf_counter() - start
    if done.stderr:
        raise SystemExit(done.stderr)
    return seconds, 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--manifests", type=int, default=500, help="how many of the runs have manifests")
    parser.add_argument("--rows", type=int, default=200, help="of a run's manifests")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), options.runs, options.manifests, options.rows)
        print(f"{options.runs:,} runs, {options.manifests * options.rows:,} manifest rows")
        published = str(CONF.parent / "experiments" / "unguide" / "published.csv")
        for words in (
            [],
            ["--format", "latex"],
            ["--format", "html"],
            ["--by", "method", "--published", published],
            ["--check"],
        ):
            seconds, memory = measured(folder, *words)
            fits = "" if seconds < SECONDS and memory < BYTES else "  over the target"
            print(
                f"{seconds:6.1f} s  {memory / 1e6:6.0f} MB  unlearn-table {' '.join(words)}{fits}".replace(
                    published, "..."
                )
            )


if __name__ == "__main__":
    main()

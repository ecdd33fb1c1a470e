"""Finished runs, faked on disk: what the other stages would have left there."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from unlearning.store import images
from unlearning.store.images import Row

JUDGE = "judge v1, argmax over 31 classes"
METRICS = {
    "efficacy/acc_e": 5.0,
    "efficacy/acc_e/protocol": JUDGE,
    "base/efficacy/acc_e": 100.0,
    "base/efficacy/acc_e/protocol": JUDGE,
    "fidelity/fid": 14.25,
    "fidelity/fid/protocol": "2,000 pictures & the judge's features",
    "cost/seconds": 1234.5,
}


@pytest.fixture
def finished(tmp_path):
    """finished(place, metrics={...}, pictures=[(prompt, role, object, count), ...], model=...) -> the run's folder.

    `config` is what else its config.yaml has, `chosen` what else was chosen of a group.
    """

    def make(place="run", metrics=METRICS, pictures=(), size=8, config=None, chosen=None, **settings) -> Path:
        run = tmp_path / place
        known = {"model": "emoji_unet", "dataset": "emoji_objects", "concept": "cat", "method": "esd_x", "seed": 0}
        known |= settings
        choices = {key: known[key] for key in ("model", "dataset", "method")} | (chosen or {})
        config = {"sampler": {"steps": known.get("steps", 50)}, **(config or {})}
        config |= {"concept": known["concept"], "seed": known["seed"]}
        config["paths"] = {"output_dir": "${hydra:runtime.output_dir}"}  # resolves nowhere but in a running Hydra
        (run / ".hydra").mkdir(parents=True)
        for name, content in {
            "config": config,
            "overrides": [f"method={known['method']}", f"concept={known['concept']}", "stages=[report]"],
            "hydra": {"hydra": {"runtime": {"choices": choices}}},
        }.items():
            (run / ".hydra" / f"{name}.yaml").write_text(yaml.safe_dump(content))
        (run / "metrics.json").write_text(json.dumps(metrics))
        (run / "erasure").mkdir()
        (run / "erasure" / "README.md").write_text("---\nlicense: mit\n---\n# Without a cat\n\n<b>raw</b> | *fine*\n")
        rng = np.random.default_rng(0)
        for which in ("base", "erased"):
            rows = [
                Row(run / "store" / which / f"{i}-{j}.png", prompt, role, {"object": label, "style": "color"}, j)
                for i, (prompt, role, label, count) in enumerate(pictures)
                for j in range(count)
            ]
            for row in rows:
                images.save(rng.integers(0, 255, (size, size, 3), np.uint8), row)
            images.write_manifest(run / "images" / f"{which}.csv", rows)
        return run

    return make

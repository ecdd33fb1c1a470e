"""Finished runs as the stages leave them on disk."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from unlearning.store.images import write_image
from unlearning.store.manifest import ManifestRow, write_manifest

JUDGE = "judge v1, argmax over 31 classes"
METRICS = {
    "efficacy/acc_e": 5.0,
    "efficacy/acc_e/protocol": JUDGE,
    "efficacy/acc_e/better": "lower",
    "base/efficacy/acc_e": 100.0,
    "base/efficacy/acc_e/protocol": JUDGE,
    "fidelity/fid": 14.25,
    "fidelity/fid/protocol": "2,000 pictures & the judge's features",
    "cost/seconds": 1234.5,
}


@pytest.fixture(scope="session")
def finished_in():
    """finished_in(folder, place, metrics={...}, pictures=[(prompt, role, object, count), ...], model=...) -> the run.

    `config` is what else its settings have, `chosen` the files chosen for other groups, `attacks` the prompt of each
    attack by name.
    """

    def make(
        folder, place="run", metrics=METRICS, pictures=(), size=8, config=None, chosen=None, attacks=None, **settings
    ) -> Path:
        run = folder / place
        known = {"model": "emoji_unet", "dataset": "emoji_objects", "concept": "cat", "method": "esd_x", "seed": 0}
        known |= settings
        choices = {key: known[key] for key in ("model", "dataset", "method")} | (chosen or {})
        config = {"sampler": {"steps": known.get("steps", 50)}, "after": None, **(config or {})}
        config |= {"concept": known["concept"], "seed": known["seed"], "paths": {"output_dir": str(run)}}
        (run / ".hydra").mkdir(parents=True)
        for name, content in {
            "resolved": config,
            "overrides": [f"method={known['method']}", f"concept={known['concept']}", "stages=[report]"],
            "hydra": {"hydra": {"runtime": {"choices": choices}}},
        }.items():
            (run / ".hydra" / f"{name}.yaml").write_text(yaml.safe_dump(content))
        (run / "metrics.json").write_text(json.dumps(metrics))
        (run / "erasure").mkdir()
        (run / "erasure" / "README.md").write_text("---\nlicense: mit\n---\n# Without a cat\n\n<b>raw</b> | *fine*\n")
        rng = np.random.default_rng(0)

        def draw(drawing, pictures):
            rows = [
                ManifestRow(
                    run / "store" / drawing / f"{i}-{j}.png", prompt, role, {"object": label, "style": "color"}, j
                )
                for i, (prompt, role, label, count) in enumerate(pictures)
                for j in range(count)
            ]
            for row in rows:
                write_image(row.path, rng.integers(0, 255, (size, size, 3), np.uint8))
            write_manifest(run / "images" / f"{drawing}.csv", rows)

        draw("base", pictures)
        draw("erased", pictures)
        for name, prompt in (attacks or {}).items():
            draw(f"attacked-{name}", [(prompt, "attack", known["concept"], 1)])
        return run

    return make


@pytest.fixture
def finished(finished_in, tmp_path):
    """As `finished_in`, below the test's own folder."""
    return lambda *args, **options: finished_in(tmp_path, *args, **options)

"""The same scenes with every replacement inside the true boxes: python experiments/lcr/pictures.py [overrides]

Writes pictures.png. Its columns are the scene, its reconstruction, and the replacements in the order of REPLACEMENTS.
"""

import sys
from pathlib import Path

import numpy as np
from bench import Bench
from table import REPLACEMENTS, reconstructed

from unlearning.codes.frequency import count_codes
from unlearning.codes.replacement import Blocks
from unlearning.store.manifest import load_images, manifest_of_inputs
from unlearning.tracking.figures import grid

SCENES = 5


def main(overrides: list[str]) -> None:
    bench = Bench([f"dataset.images={SCENES}", *overrides])
    rows = manifest_of_inputs(bench.folder / "images", bench.task, 0)[:SCENES]
    columns = [load_images(rows, "source"), reconstructed(bench, rows)]
    frequencies = count_codes(bench.model, bench.task, bench.trainer, pairs=True, blocks=Blocks.blocks)
    where = ["method=lcr_localized", "detector@method.detector=boxes"]
    for replacement in REPLACEMENTS:
        erasure = bench.method(*where, f"replacement@method.replacement={replacement}").edit(frequencies)
        with erasure.applied_to(bench.model):
            columns.append(reconstructed(bench, rows))
    sheet = grid(list(np.stack(columns, 1).reshape(-1, *columns[0].shape[1:])), len(columns))
    sheet.save(Path(__file__).with_name("pictures.png"))


if __name__ == "__main__":
    main(sys.argv[1:])

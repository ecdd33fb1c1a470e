"""The drift that experiments/scrubber/measure.py reports, for images whose drift is known."""

import runpy
from pathlib import Path

import numpy as np
import pytest

from tests.evaluators.test_fid import Means, noise
from unlearning.concepts import ERASE, RETAIN
from unlearning.store.images import write_image
from unlearning.store.manifest import ManifestRow, write_manifest

MEASURE = runpy.run_path(str(Path(__file__).parents[2] / "experiments/scrubber/measure.py"))


@pytest.fixture
def run(tmp_path):
    """run(seed, erased) -> the folder of a run: forty retained images, noise before and `erased` after."""

    def drawn(seed: int, erased: np.ndarray) -> Path:
        folder = tmp_path / f"seed{seed}"
        for name, pictures in {"base": noise(40, seed), "erased": erased}.items():
            rows = [ManifestRow(folder / name / f"{i}.png", "a dog", RETAIN, {}, i) for i in range(40)]
            cat = ManifestRow(folder / name / "cat.png", "a cat", ERASE, {}, 40)  # not part of the drift
            for picture, row in zip([*pictures, np.full((8, 8, 3), 255, np.uint8)], [*rows, cat], strict=True):
                write_image(row.path, picture)
            write_manifest(folder / "images" / f"{name}.csv", [*rows, cat])
        return folder

    return drawn


def test_unchanged_images_and_those_of_another_seed_have_known_drifts(run):
    others = [run(seed, noise(40, seed)) for seed in (1, 2)]
    assert MEASURE["drift"](Means(), run(0, noise(40, 0)), others) == pytest.approx((1, 0), abs=1e-4)
    assert MEASURE["drift"](Means(), run(3, noise(40, 1)), others[:1]) == pytest.approx((0, 1), abs=1e-4)


def test_a_tint_drifts_by_its_square(run):
    other, tinted = run(1, noise(40, 1)), run(0, noise(40, 0) + np.uint8(3))
    (floor,) = MEASURE["fids"](Means(), MEASURE["_retained"](other / "images/base.csv"),
                               MEASURE["_retained"](tinted / "images/base.csv"))  # fmt: skip
    assert MEASURE["drift"](Means(), tinted, [other])[1] == pytest.approx(12 * 3**2 / floor, rel=1e-3)

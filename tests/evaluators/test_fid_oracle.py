"""The FID to the oracle's images."""

import numpy as np
import pytest
from PIL import Image

from tests.evaluators.test_fid import Means, noise
from unlearning.concepts import ERASE, RETAIN, SYNONYM
from unlearning.evaluators.fid_oracle import FIDOracle
from unlearning.methods.oracle import Oracle
from unlearning.store.manifest import ManifestRow


@pytest.fixture
def rows(tmp_path):
    """rows(role, images) -> rows with these images of the oracle."""

    def make(role, images):
        made = []
        for image in images:
            Image.fromarray(image).save(path := tmp_path / f"{len(list(tmp_path.iterdir()))}.png")
            made.append(ManifestRow(path, "a prompt", role, {}, 0, oracle=path))
        return made

    return make


def test_a_shift_from_the_oracles_images_costs_its_square_in_each_role(rows):
    metric, images = FIDOracle(Means(), Oracle(path="nowhere"), device="cpu"), noise(30, 0)
    metric.update(images[:20] + np.uint8(3), [*rows(ERASE, images[:10]), *rows(SYNONYM, images[10:20])])
    metric.update(images, rows(RETAIN, images))
    metric.update(noise(5, 1), [ManifestRow(row.path, "", RETAIN, {}, 0) for row in rows(RETAIN, noise(5, 2))])
    numbers = metric.compute()
    assert numbers["efficacy/fid_oracle"] == pytest.approx(12 * 3**2, abs=1e-3)
    assert numbers["retention/fid_oracle"] == pytest.approx(0, abs=1e-3)
    assert "efficacy 20, retention 30" in metric.protocol


def test_rows_without_an_image_of_the_oracle_have_no_distance():
    metric = FIDOracle(Means(), Oracle(path="nowhere"), device="cpu")
    metric.update(noise(2, 0), [ManifestRow(None, "", ERASE, {}, 0)] * 2)
    assert metric.compute() == {}

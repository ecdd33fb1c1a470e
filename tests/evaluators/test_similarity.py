"""PSNR and SSIM outside the erased regions, changed cells, and regions as images."""

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from unlearning.concepts import ERASE, RETAIN, Region
from unlearning.data.regions import with_regions
from unlearning.evaluators.replaced import Replaced
from unlearning.evaluators.similarity import Similarity
from unlearning.store.images import write_image
from unlearning.store.manifest import ManifestRow

RNG = np.random.default_rng(0)
BASE = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
BOX = Region((0, 0, 16, 32), ERASE, {"object": "cat"})


@pytest.fixture
def row(tmp_path):
    base = ManifestRow(tmp_path / "base.png", "", RETAIN, {}, 0)
    write_image(base.path, BASE)
    return lambda role=RETAIN, regions=(): ManifestRow(
        tmp_path / "x.png", "", role, {}, 0, base=base.path, regions=regions
    )


def measured(image, *rows):
    metric = Similarity("cpu")
    metric.update(np.stack([image] * len(rows)), rows)
    return metric.compute()


def test_psnr_and_ssim_follow_their_definitions(row):
    image = (BASE * 0.8 + 20).astype(np.uint8)
    metrics = measured(image, row())
    mse = np.mean((image / 255.0 - BASE / 255.0) ** 2)
    assert metrics["fidelity/psnr"] == pytest.approx(-10 * np.log10(mse), abs=1e-4)
    own = structural_similarity(BASE, image, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5,
                                use_sample_covariance=False, full=True)[1].mean()  # fmt: skip
    assert metrics["fidelity/ssim"] == pytest.approx(own, abs=0.02)


def test_erased_regions_do_not_count(row):
    image = BASE.copy()
    image[:, :16] = 255 - image[:, :16]
    assert measured(image, row(ERASE, (BOX,)))["fidelity/psnr"] == pytest.approx(60), "no pixel outside has changed"
    image[5, 20] = 255 - image[5, 20]
    assert measured(image, row(ERASE, (BOX,)))["fidelity/psnr"] < 60


def test_rows_without_something_to_compare_are_skipped(row, tmp_path):
    alone = ManifestRow(tmp_path / "y.png", "", RETAIN, {}, 0)
    assert measured(BASE, alone) == {} and measured(BASE, row(ERASE)) == {}


def test_shares_of_changed_cells_and_unchanged_images(tmp_path):
    def row(role, **decided):
        return ManifestRow(tmp_path / "x.png", "", role, {}, 0, decided=decided)

    rows = [row(ERASE, cells=100, changed=10), row(ERASE, cells=100, changed=0), row(RETAIN, cells=100, changed=5),
            row(ERASE)]  # fmt: skip
    metric = Replaced()
    metric.update(np.zeros((4, 8, 8, 3), np.uint8), rows)
    assert metric.compute() == {
        "efficacy/unchanged": 50.0, "fidelity/cells_changed": 5.0, "retention/cells_changed": 5.0
    }  # fmt: skip


def test_a_region_is_cut_out_square_with_its_role_and_labels(tmp_path):
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[10:30, 40:60] = 255
    regions = (Region((40, 10, 60, 30), ERASE, {"object": "cat"}), Region((0, 0, 64, 64), RETAIN, {"object": "dog"}))
    row = ManifestRow(tmp_path / "x.png", "", RETAIN, {}, 0, regions=regions)
    images, rows = with_regions(picture[None], [row])
    assert images.shape == (2, 64, 64, 3) and [r.role for r in rows] == [ERASE, RETAIN]
    assert [r.labels["object"] for r in rows] == ["cat", "dog"] and not any(r.regions for r in rows)
    assert np.array_equal(images[1], picture)
    assert images[0][32, 32, 0] == 255 and images[0][1, 1, 0] == 0, "a tenth of margin on each side"
    share = (images[0] > 127).mean()
    assert share == pytest.approx((20 / 24) ** 2, abs=0.05)
    plain = ManifestRow(tmp_path / "x.png", "", RETAIN, {"object": "cat"}, 0)
    again, same = with_regions(picture[None], [plain])
    assert np.array_equal(again[0], picture) and same == [plain]

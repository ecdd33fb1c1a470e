"""Images as PNG files: they come back as they were, and a damaged one is an error."""

import numpy as np
import pytest
from PIL import Image

from unlearning.errors import UserError
from unlearning.store.images import figure_paths, read_decided, read_images, write_figures, write_image


def test_images_come_back_to_the_bit(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 6, 3), np.uint8)
    paths = [tmp_path / "not" / "yet" / f"{i}.png" for i in range(2)]
    for path, image in zip(paths, images, strict=True):
        write_image(path, image, {"w": 0.5} if path == paths[0] else None)
    assert (read_images(paths) == images).all() and read_images(paths).dtype == np.uint8
    assert Image.open(paths[0]).format == "PNG"
    assert [read_decided(path) for path in paths] == [{"w": 0.5}, {}]


@pytest.mark.parametrize("part", [0, 20, 100])
def test_a_damaged_image_is_named(tmp_path, part):
    path = tmp_path / "a.png"
    write_image(path, np.random.default_rng(0).integers(0, 256, (8, 6, 3), np.uint8))
    path.write_bytes(path.read_bytes()[:part])
    with pytest.raises(UserError, match=r"a\.png"):
        read_images([path])


def test_figures_are_found_by_their_captions_in_their_order(tmp_path):
    assert figure_paths(tmp_path) == {}
    write_figures(tmp_path, {"what is found": Image.new("RGB", (2, 2)), "masks": Image.new("RGB", (3, 3))})
    found = figure_paths(tmp_path)
    assert list(found) == ["what is found", "masks"] and Image.open(found["masks"]).size == (3, 3)

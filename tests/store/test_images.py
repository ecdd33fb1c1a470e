"""Images as PNG files: they are restored exactly, and a damaged file is an error."""

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image

from unlearning.errors import UserError
from unlearning.reporting.page_images import thumbnail
from unlearning.store.images import (
    figure_paths,
    read_decided,
    read_figures,
    read_images,
    write_figures,
    write_image,
)


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


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "JPEG", "bomb", "chunk"])
def test_incomplete_pngs_are_not_opened(tmp_path, monkeypatch, content):
    """Pillow would hand PostScript to Ghostscript."""
    path = tmp_path / "a.png"
    write_image(path, np.random.default_rng(0).integers(0, 256, (200, 200, 3), np.uint8))
    if content == "JPEG":
        Image.new("RGB", (9, 9)).save(path, "JPEG")
    elif content == "bomb":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    elif content == "chunk":
        whole = path.read_bytes()
        path.write_bytes(whole[: (second := whole.rindex(b"IDAT"))] + b"\0\0\0\0" + whole[second + 4 :])
    else:
        path.write_bytes(content)
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", None)  # calling it would be an error
    with pytest.raises(UserError, match=r"a\.png"):
        read_images([path])
    assert thumbnail(path, 9) is None


def test_a_damaged_figure_is_left_out_with_a_warning(tmp_path, caplog):
    write_figures(tmp_path, {"one": Image.new("RGB", (2, 2)), "other": Image.new("RGB", (3, 3))})
    figure_paths(tmp_path)["one"].write_bytes(b"no figure")
    assert {caption: figure.size for caption, figure in read_figures(tmp_path).items()} == {"other": (3, 3)}
    assert "0-one.png" in caplog.text


def test_figures_are_found_by_their_captions_in_their_order(tmp_path):
    assert figure_paths(tmp_path) == {}
    write_figures(tmp_path, {"what is found": Image.new("RGB", (2, 2)), "masks": Image.new("RGB", (3, 3))})
    found = figure_paths(tmp_path)
    assert list(found) == ["what is found", "masks"] and Image.open(found["masks"]).size == (3, 3)

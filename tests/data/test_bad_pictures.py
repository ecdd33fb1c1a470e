"""Bad images in a user's folders: the message names them, and nothing half-written is left on disk."""

import re
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image

from unlearning.data.folder import folder

SCRUB = [
    "method=scrubber", "dataset=folder", "dataset.size=16", "dataset.images_per_prompt=1", "method.iterations=1",
    "method.batch_size=2", "method.conditioning=null", "method.prototypes.K=2", "method.prototypes.purity=0",
    "method.prototypes.draws=1", "method.prototypes.layer=null",
]  # fmt: skip


def noise(seed: int, mode: str = "RGB") -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 255, (16, 16, 3), np.uint8)
    return Image.fromarray(pixels).convert(mode)


@pytest.fixture
def folders(tmp_path):
    """(forget, retain): six pictures each."""
    places = tmp_path / "cats", tmp_path / "others"
    for seed, place in enumerate(places):
        place.mkdir()
        for i in range(6):
            noise(100 * seed + i).save(place / f"{i}.png")
    return places


def typed(folders) -> list[str]:
    forget, retain = folders
    return [*SCRUB, f"forget={forget}", f"retain={retain}"]


def emptied(forget, retain):
    shutil.rmtree(forget)
    forget.mkdir()
    return str(forget), "no image that can be read"


def nothing_but_text(forget, retain):
    emptied(forget, retain)
    (forget / "notes.txt").write_text("cats")
    return str(forget), "no image that can be read"


def nothing_but_broken(forget, retain):
    for path in forget.iterdir():
        path.write_bytes(path.read_bytes()[:60])
    return str(forget), "no image that can be read"


def the_same(forget, retain):
    shutil.rmtree(retain)
    shutil.copytree(forget, retain)
    return "6 of the 6 retain images are forget images too", f"{retain / '0.png'} and {forget / '0.png'}"


def encoded_otherwise(forget, retain):
    shutil.rmtree(retain)
    retain.mkdir()
    for i, path in enumerate(sorted(forget.iterdir())):
        (Image.open(path) if i < 3 else noise(50 + i)).save(retain / f"{path.stem}.bmp")
    return ("3 of the 5 retain images are forget images too",)  # the sixth is kept to measure against


@pytest.mark.parametrize("spoil", [emptied, nothing_but_text, nothing_but_broken, the_same, encoded_otherwise])
@pytest.mark.filterwarnings("ignore:.*(cannot be read|are ignored)")
def test_pictures_that_are_of_no_use_are_refused_by_name_and_nothing_is_left(told, tmp_path, folders, spoil):
    wanted = spoil(*folders)
    said = told(*typed(folders))
    assert all(part in said for part in wanted), said
    nothing_is_half_written(tmp_path)


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("method.prototypes.K=81", "81 prototypes cannot be made of 80 feature vectors: lower method.prototypes.K"),
        ("method.prototypes.K=0", "method.prototypes.K has to be 1 or more, and is 0"),
        ("method.prototypes.band=[700,300]", "method.prototypes.band has to be two timesteps, the lower first"),
    ],
)
def test_settings_that_do_not_fit_the_pictures_are_refused_by_name_and_nothing_is_left(
    told, tmp_path, folders, setting, says
):
    assert says in told(*typed(folders), setting)
    nothing_is_half_written(tmp_path)


def nothing_is_half_written(place):
    left = {p.name for p in place.rglob("*")}
    assert not left & {"erasure", "figures", "checkpoints", "metrics.json"}
    assert not [name for name in left if "partial" in name]


def truncated(forget):
    whole = (forget / "5.png").read_bytes()
    (forget / "5.png").write_bytes(whole[: len(whole) // 2])
    return r"1 of 6 images .*5\.png"


def of_one_pixel(forget):
    Image.new("RGB", (1, 1)).save(forget / "dot.png")
    return r"1 of 7 images .*dot\.png \(1 by 1"


def beside_text(forget):
    for name in ("0.txt", "1.txt", "raw.heic"):
        (forget / name).write_text("a cat")
    return r"cats .*: 2 \.txt, 1 \.heic"


def among_many(forget):
    for i in range(300):
        noise(1000 + i).save(forget / f"{i}.bmp")
    (forget / "77.bmp").write_bytes(b"no picture")
    return r"1 of 306 images .*77\.bmp"


def of_any_colours(forget):
    for mode, suffix in (("CMYK", "jpg"), ("P", "gif"), ("RGBA", "png"), ("LA", "webp"), ("1", "tif")):
        noise(7, mode).save(forget / f"{mode}.{suffix}")
    return None


@pytest.mark.parametrize("spoil", [truncated, of_one_pixel, beside_text, among_many, of_any_colours])
def test_a_run_goes_on_without_a_bad_picture_and_names_it(unlearn, folders, spoil):
    wanted = spoil(folders[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = unlearn(*typed(folders))
    said = [str(w.message) for w in caught if "cannot be read" in str(w.message) or "are ignored" in str(w.message)]
    assert len(said) == bool(wanted) and (run / "metrics.json").exists() and (run / "report.html").exists()
    assert {p.name for p in run.iterdir()} >= {"erasure", "figures", "images"} and not list(run.rglob("*partial*"))
    assert all(re.search(wanted, message) for message in said)


def test_of_ten_thousand_pictures_one_is_broken(tmp_path):
    for i in range(10_000):
        (tmp_path / f"{i:05}.bmp").hardlink_to(tmp_path / "00000.bmp") if i else noise(0).save(tmp_path / "00000.bmp")
    (tmp_path / "04321.bmp").unlink()
    (tmp_path / "04321.bmp").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"^1 of 10000 images .*04321\.bmp"):
        assert len(folder("cat", str(tmp_path), size=8).forget_images) == 8000

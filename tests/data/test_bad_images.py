"""Bad images in a user's folders: the message names them, and nothing half-written is left on disk."""

import os
import shutil
import warnings

import numpy as np
import pytest
from PIL import Image

from tests.processes import COMMAND_LINE, Started
from unlearning.data import references
from unlearning.data.folder import folder, read
from unlearning.errors import UserError

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
    """(forget, retain): folders of six images each."""
    places = tmp_path / "cats", tmp_path / "others"
    for seed, place in enumerate(places):
        place.mkdir()
        for i in range(6):
            noise(100 * seed + i).save(place / f"{i}.png")
    return places


def typed(folders) -> list[str]:
    forget, retain = folders
    return [*SCRUB, f"forget={forget}", f"retain={retain}"]


def nothing_but_broken(forget, retain):
    for path in forget.iterdir():
        path.write_bytes(path.read_bytes()[:60])
    return str(forget), "no image"


def the_same(forget, retain):
    shutil.rmtree(retain)
    shutil.copytree(forget, retain)
    return "6 of the 6", f"{retain / '0.png'} and {forget / '0.png'}"


def encoded_otherwise(forget, retain):
    shutil.rmtree(retain)
    retain.mkdir()
    for i, path in enumerate(sorted(forget.iterdir())):
        (Image.open(path) if i < 3 else noise(50 + i)).save(retain / f"{path.stem}.bmp")
    return ("3 of the 5",)  # the sixth is a reference of the evaluation


@pytest.mark.parametrize("spoil", [nothing_but_broken, the_same, encoded_otherwise])
@pytest.mark.filterwarnings("ignore:.*cannot be read")
def test_images_that_cannot_be_used_are_refused_and_nothing_is_left(error_of, tmp_path, folders, spoil):
    wanted = spoil(*folders)
    said = error_of(*typed(folders))
    assert all(part in said for part in wanted), said
    nothing_is_half_written(tmp_path)


@pytest.mark.parametrize("setting", ["method.prototypes.K=81", "method.prototypes.band=[700,300]"])
def test_settings_that_do_not_fit_the_images_are_refused_and_nothing_is_left(error_of, tmp_path, folders, setting):
    assert setting.partition("=")[0] in error_of(*typed(folders), setting)
    nothing_is_half_written(tmp_path)


def nothing_is_half_written(place):
    left = {p.name for p in place.rglob("*")}
    assert not left & {"erasure", "figures", "checkpoints", "metrics.json"}
    assert not [name for name in left if "partial" in name]


def test_a_run_resumes_without_a_broken_image_and_names_it(unlearn, folders):
    forget = folders[0]
    whole = (forget / "5.png").read_bytes()
    (forget / "5.png").write_bytes(whole[: len(whole) // 2])
    (forget / "raw.heic").write_text("a cat")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = unlearn(*typed(folders))
    said = " ".join(str(w.message) for w in caught)
    assert str(forget / "5.png") in said and "1 .heic" in said
    assert {p.name for p in run.iterdir()} >= {"erasure", "figures", "images", "metrics.json", "report.html"}
    assert not list(run.rglob("*partial*"))


def test_one_of_a_thousand_images_is_broken(tmp_path):
    for i in range(1000):
        (tmp_path / f"{i:03}.bmp").hardlink_to(tmp_path / "000.bmp") if i else noise(0).save(tmp_path / "000.bmp")
    (tmp_path / "432.bmp").unlink()
    (tmp_path / "432.bmp").write_bytes(b"no picture")
    with pytest.warns(UserWarning, match=r"^1 of 1000 images .*432\.bmp"):
        assert len(folder("cat", str(tmp_path), size=8).forget_images) == 800


def test_a_file_of_another_format_is_not_opened_whatever_it_is_called(folders):
    """Pillow would hand PostScript to Ghostscript."""
    forget, _ = folders
    (forget / "0.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\nshowpage\n")
    with pytest.warns(UserWarning, match=r"0\.png \(cannot identify image file"):
        assert len(read(forget, 16)) == 5


def test_a_warning_is_shown_without_the_code_that_gives_it(folders, unlearn):
    forget, retain = folders
    (forget / "photo.heic").touch()
    chosen = ["dataset=folder", "dataset.size=16", f"forget={forget}", f"retain={retain}", "stages=[]"]
    process = Started(COMMAND_LINE, unlearn.arguments(*chosen))
    assert process.wait() == 0
    shown = process.stderr
    assert "photo" not in shown and "1 .heic" in shown and "UserWarning" not in shown and ".py" not in shown


def test_heic_images_get_a_hint(folders):
    forget, _ = folders
    (forget / "photo.HEIC").touch()
    with pytest.warns(UserWarning, match="JPEG"):
        read(forget, 16)
    for path in forget.glob("*.png"):
        path.unlink()
    with pytest.warns(UserWarning), pytest.raises(UserError, match="HEIC"):
        read(forget, 16)


@pytest.fixture
def spoiled(folders, monkeypatch):
    """spoiled(how) -> a JPEG among a folder's images that cannot be read."""

    def call(how: str):
        image = folders[0] / "photo.jpg"
        noise(1).resize((64, 64)).save(image)
        if how == "bomb":
            monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 40 * 40)
        else:
            image.write_bytes(image.read_bytes()[:-700] if how == "truncated" else b"no image")
        return image

    return call


@pytest.mark.parametrize("how", ["broken", "bomb", "truncated"])
def test_a_real_image_that_cannot_be_read_is_named(spoiled, how):
    image = spoiled(how)
    with pytest.raises(UserError, match=image.name):
        references.check(image.parent)


def test_the_error_comes_before_any_image_is_generated(error_of, spoiled, tmp_path):
    image = spoiled("truncated")
    message = error_of("dataset=prompt", "evaluator=fid", f"evaluator.fid.real={image.parent}")
    assert str(image) in message and not (tmp_path / "store").exists()


def test_non_files_among_real_images_are_skipped_and_named(folders, tmp_path):
    forget, _ = folders
    os.mkfifo(forget / "pipe.png")
    (forget / "linked").symlink_to(tmp_path, target_is_directory=True)
    with pytest.warns(UserWarning, match=r"linked.*pipe\.png"):
        assert sum(map(len, references.of_folder(forget).batches())) == 6


def test_real_images_are_read_once_more_when_they_are_measured(folders):
    forget, _ = folders
    references.check(forget)
    assert sum(map(len, references.of_folder(forget).batches())) == 6

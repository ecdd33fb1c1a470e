"""The store: a picture's place says all that it depends on, and nothing is ever half there."""

import errno
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unlearning.concepts import ATTACK, Concept, Prompt, Region, UnlearningTask
from unlearning.store.files import digest, write_atomically
from unlearning.store.images import (
    Row,
    image_path,
    image_seed,
    load,
    manifest,
    missing,
    read_manifest,
    save,
    write_manifest,
)

STORE = Path("/store/model")


def task(*texts, count=2, **labels) -> UnlearningTask:
    prompts = tuple(Prompt(text, "erase", labels) for text in texts)
    return UnlearningTask((Concept("cat"),), prompts=prompts, images_per_prompt=count)


def paths(rows) -> list[Path]:
    return [row.path for row in rows]


# --- keys -------------------------------------------------------------------------------------------------------------


def test_a_digest_is_of_content_alone():
    assert digest({"a": 1, "b": (2, 3)}) == digest({"b": [2, 3], "a": 1})
    assert len({digest("ab", "c"), digest("a", "bc"), digest("abc"), digest(["ab", "c"]), digest()}) == 5
    assert len(digest()) == 16


def test_the_same_content_has_the_same_path():
    one, other = manifest(STORE, task("a cat", "a dog"), 0), manifest(STORE, task("a dog", "a cat"), 0)
    assert set(paths(one)) == set(paths(other)), "the order of the prompts changes nothing"
    assert set(paths(manifest(STORE, task("a cat"), 0))) < set(paths(one)), "nor do a task's other prompts"
    assert paths(manifest(STORE, task("a cat", object="tiger"), 0)) == paths(one)[:2], "nor what a picture is for"
    assert set(paths(manifest(STORE, task("a cat", count=1), 0))) < set(paths(one)), "more pictures keep the first"


def test_any_change_has_another_path():
    rows = manifest(STORE, task("a cat"), 0)
    others = [
        *manifest(STORE, task("a  cat"), 0),
        *manifest(STORE, task("A cat"), 0),
        *manifest(STORE, task("a cat"), 1),
        *manifest(STORE.with_name("other"), task("a cat"), 0),
    ]
    assert len({*paths(rows), *paths(others)}) == len(rows) + len(others)


def test_seeds_are_of_the_runs_seed_the_text_and_the_sample_only():
    rows = manifest(STORE, task("a cat", "a dog", count=3), 5)
    assert [row.seed for row in rows] == [image_seed(5, text, i) for text in ("a cat", "a dog") for i in range(3)]
    assert [row.seed for row in manifest(Path("/else"), task("a dog", count=3), 5)] == [row.seed for row in rows[3:]]
    seeds = {image_seed(s, text, i) for s in range(5) for text in ("a cat", "a dog", "") for i in range(50)}
    assert len(seeds) == 5 * 3 * 50
    assert image_seed(0, "a cat", 0) == 3399140311, "published numbers depend on it"


def test_what_an_attack_found_is_part_of_the_path(tmp_path):
    (tmp_path / "one").write_bytes(b"one")
    (tmp_path / "same").write_bytes(b"one")
    (tmp_path / "another").write_bytes(b"another")
    paths = {name: image_path(STORE, "a cat", 3, comeback=tmp_path / name) for name in ("one", "same", "another")}
    assert paths["one"] == paths["same"], "the content alone decides"
    assert len({*paths.values(), image_path(STORE, "a cat", 3), image_path(STORE, "a cat", 3, 7.5)}) == 4
    [row] = manifest(STORE, task("a cat", count=1), 0)
    assert row.path == image_path(STORE, "a cat", row.seed)


def test_a_prompt_asked_twice_is_drawn_once(tmp_path):
    rows = manifest(tmp_path, task("a cat", "a cat", count=2), 0)
    assert len(rows) == 4 and len(missing(rows)) == 2
    save(np.zeros((4, 4, 3), np.uint8), rows[0])
    assert paths(missing(rows)) == [rows[1].path]


# --- pictures and manifests -------------------------------------------------------------------------------------------


def test_pictures_come_back_to_the_bit(tmp_path):
    rows = manifest(tmp_path / "not" / "yet", task("a cat"), 0)
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 6, 3), np.uint8)
    for image, row in zip(images, rows, strict=True):
        save(image, row)
    assert (load(rows) == images).all() and load(rows).dtype == np.uint8
    assert Image.open(rows[0].path).format == "PNG" and missing(rows) == []


def test_a_manifest_comes_back_as_it_was(tmp_path):
    rows = [
        Row(tmp_path / "store" / "a.png", 'a "cat", on\ntwo lines; naïve 猫', "erase", {"object": "cat"}, 2**32 - 1),
        Row(tmp_path / "run" / "b.png", "", "retain", {}, 0),
        Row(
            tmp_path / "run" / "c.png",
            "a cat",
            ATTACK,
            {"object": "cat"},
            1,
            2.5,
            {"w": 0.5},
            base=tmp_path / "base.png",
            source=tmp_path / "source.png",
            regions=(Region((1, 2, 3, 4), "erase", {"object": "cat"}),),
            concept="cat",
            comeback=tmp_path / "run" / "attacks" / "0.safetensors",
        ),
    ]
    write_manifest(tmp_path / "run" / "images" / "base.csv", rows)
    assert read_manifest(tmp_path / "run" / "images" / "base.csv") == rows


def test_a_manifest_of_an_earlier_version_is_read(tmp_path):
    (tmp_path / "base.csv").write_text(
        "path,prompt,role,labels,seed,guidance_scale,decided\na.png,a cat,erase,{},3,,{}\n"
    )
    assert read_manifest(tmp_path / "base.csv") == [Row(tmp_path / "a.png", "a cat", "erase", {}, 3)]


def test_a_manifest_moves_with_its_pictures(tmp_path):
    rows = manifest(tmp_path / "one" / "store", task("a cat"), 0)
    for row in rows:
        save(np.full((2, 2, 3), 7, np.uint8), row)
    write_manifest(tmp_path / "one" / "run" / "base.csv", rows)
    (tmp_path / "one").rename(tmp_path / "another")
    assert (load(read_manifest(tmp_path / "another" / "run" / "base.csv")) == 7).all()


# --- all or nothing ---------------------------------------------------------------------------------------------------


def fail_midway(monkeypatch, step: str) -> None:
    """The disk is full: half of a file is written and then nothing more; or the file cannot be renamed."""
    write_bytes = Path.write_bytes

    def full(self, *arguments):
        if step == "write_bytes":
            write_bytes(self, arguments[0][: len(arguments[0]) // 2])
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    monkeypatch.setattr(Path, step, full)


@pytest.mark.parametrize("step", ["write_bytes", "replace"])
def test_a_write_that_fails_leaves_no_half_file(tmp_path, monkeypatch, step):
    row = Row(tmp_path / "a.png", "a cat", "erase", {}, 0)
    (tmp_path / "numbers.json").write_text("[1, 2]")
    with monkeypatch.context() as patch:
        fail_midway(patch, step)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(tmp_path / "numbers.json", "[3, 4, 5]")
        with pytest.raises(OSError, match="No space left"):
            save(np.zeros((4, 4, 3), np.uint8), row)
    assert (tmp_path / "numbers.json").read_text() == "[1, 2]", "what was there stays"
    assert [p.name for p in tmp_path.iterdir()] == ["numbers.json"], "nothing half-written is left"
    save(np.zeros((4, 4, 3), np.uint8), row)
    assert missing([row]) == []


def test_an_interrupted_write_leaves_no_half_file(tmp_path, monkeypatch):
    def interrupted(self, content):
        self.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "numbers.json", "[]")
    assert list(tmp_path.iterdir()) == []

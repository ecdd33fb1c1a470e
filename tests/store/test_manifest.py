"""Manifests: an image's path depends on everything that decides the image, and rows are restored exactly."""

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from unlearning.concepts import ATTACK, Concept, Prompt, Region, UnlearningTask
from unlearning.errors import UserError
from unlearning.store.images import write_image
from unlearning.store.manifest import (
    ManifestRow,
    batches,
    image_path,
    image_seed,
    link_outputs,
    load_images,
    manifest,
    missing,
    read_manifest,
    write_manifest,
)

STORE = Path("/store/model")
HEADER = "path,prompt,role,labels,seed,guidance_scale,decided"  # of the first version


def task(*texts, count=2, **labels) -> UnlearningTask:
    prompts = tuple(Prompt(text, "erase", labels) for text in texts)
    return UnlearningTask((Concept("cat"),), prompts=prompts, images_per_prompt=count)


def paths(rows) -> list[Path]:
    return [row.path for row in rows]


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


def test_the_result_of_an_attack_is_part_of_the_path(tmp_path):
    (tmp_path / "one").write_bytes(b"one")
    (tmp_path / "same").write_bytes(b"one")
    (tmp_path / "another").write_bytes(b"another")
    paths = {name: image_path(STORE, "a cat", 3, comeback=tmp_path / name) for name in ("one", "same", "another")}
    assert paths["one"] == paths["same"], "the content alone decides"
    assert len({*paths.values(), image_path(STORE, "a cat", 3), image_path(STORE, "a cat", 3, 7.5)}) == 4
    [row] = manifest(STORE, task("a cat", count=1), 0)
    assert row.path == image_path(STORE, "a cat", row.seed)


def test_a_size_of_its_own_is_part_of_the_path():
    sizes = [(None, None), (768, 512), (512, 768), (None, 512), (512, None)]
    prompts = [Prompt("a cat", "erase", seed=3, height=height, width=width) for height, width in sizes]
    rows = manifest(STORE, replace(task(count=1), prompts=tuple(prompts)), 0)
    assert [(row.height, row.width) for row in rows] == sizes and len(set(paths(rows))) == len(sizes)
    assert rows[0].path.name == "a54c143dc5f2a0b4.png", "earlier runs have stored images under it"


def test_batches_hold_images_of_one_size():
    rows = [ManifestRow(Path(f"{i}"), "", "erase", {}, i, height=(None, 64)[i in (1, 4)]) for i in range(6)]
    assert [[row.seed for row in batch] for batch in batches(rows, 3)] == [[0, 2, 3], [5], [1, 4]]


def test_a_repeated_prompt_is_generated_once(tmp_path):
    rows = manifest(tmp_path, task("a cat", "a cat", count=2), 0)
    assert len(rows) == 4 and len(missing(rows)) == 2
    write_image(rows[0].path, np.zeros((4, 4, 3), np.uint8))
    assert paths(missing(rows)) == [rows[1].path]


def test_a_manifest_comes_back_as_it_was(tmp_path):
    rows = [
        ManifestRow(
            tmp_path / "store" / "a.png", 'a "cat", on\ntwo lines; naïve 猫', "erase", {"object": "cat"}, 2**32 - 1
        ),
        ManifestRow(tmp_path / "run" / "b.png", "", "retain", {}, 0),
        ManifestRow(
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
            height=768,
        ),
    ]
    write_manifest(tmp_path / "run" / "images" / "base.csv", rows)
    assert read_manifest(tmp_path / "run" / "images" / "base.csv") == rows


def test_every_input_has_an_output_of_its_own(tmp_path):
    names = ["x.jpg", "x.jpg.png", "x.png", "in/x.jpg", "y.webp"]
    rows = [ManifestRow(tmp_path / f"{i}.png", name, "erase", {}, 0) for i, name in enumerate(names)]
    for row in rows:
        row.path.write_text(row.prompt)
    link_outputs(tmp_path / "out", rows)
    outputs = {str(p.relative_to(tmp_path / "out")): p.read_text() for p in (tmp_path / "out").rglob("*.png")}
    assert sorted(outputs.values()) == sorted(names)
    assert outputs["x.png"] == "x.png" and outputs["x.jpg.png"] == "x.jpg.png" and outputs["y.webp.png"] == "y.webp"


def test_a_manifest_of_an_earlier_version_is_read(tmp_path):
    (tmp_path / "base.csv").write_text(f"{HEADER}\na.png,a cat,erase,{{}},3,,{{}}\n")
    assert read_manifest(tmp_path / "base.csv") == [ManifestRow(tmp_path / "a.png", "a cat", "erase", {}, 3)]


def test_a_manifest_moves_with_its_images(tmp_path):
    rows = manifest(tmp_path / "one" / "store", task("a cat"), 0)
    for row in rows:
        write_image(row.path, np.full((2, 2, 3), 7, np.uint8))
    write_manifest(tmp_path / "one" / "run" / "base.csv", rows)
    (tmp_path / "one").rename(tmp_path / "another")
    assert (load_images(read_manifest(tmp_path / "another" / "run" / "base.csv")) == 7).all()


def test_prompts_may_be_long(tmp_path):
    path = tmp_path / "images" / "base.csv"
    write_manifest(path, [ManifestRow(tmp_path / "a.png", "a cat " * 40_000, "erase", {}, 3)])
    for read in (f"manifest.read_manifest(Path({str(path)!r}))", f"pruning.referred_to([Path({str(tmp_path)!r})])"):
        code = f"from pathlib import Path; from unlearning.store import {read.split('.')[0]}; print(len({read}))"
        # In a process of its own, in which nothing else has set csv's limit
        assert subprocess.run([sys.executable, "-c", code], capture_output=True).stdout == b"1\n"


def test_unreadable_csv_is_reported_as_damage(tmp_path, monkeypatch):
    write_manifest(tmp_path / "base.csv", [ManifestRow(tmp_path / "a.png", "a cat " * 10, "erase", {}, 3)])
    before = csv.field_size_limit(20)
    try:
        with pytest.raises(UserError, match=r"base\.csv is damaged.*field limit"):
            read_manifest(tmp_path / "base.csv")
    finally:
        csv.field_size_limit(before)


@pytest.mark.parametrize(
    "text",
    ["", "path,prompt\na.png,a cat", HEADER + "\na.png,a cat,erase,{,1,,{}", HEADER + "\na.png", HEADER + "\n,a cat"],
)
def test_a_damaged_manifest_is_named(tmp_path, text):
    (tmp_path / "base.csv").write_text(f"{text}\n")
    with pytest.raises(UserError, match=r"base\.csv"):
        read_manifest(tmp_path / "base.csv")

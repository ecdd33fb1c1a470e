"""unlearn-store: it lists the images of a store, and deletes unused ones with --delete only."""

import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from unlearning.store.images import write_image
from unlearning.store.locks import alone_in
from unlearning.store.manifest import ManifestRow, read_manifest, write_manifest
from unlearning.store.pruning import DAY, describe, in_bytes, in_units, main, note, stored_images

NOW = time.time()


@pytest.fixture
def store(tmp_path):
    """Folders of two models with three images each, 0, 10 and 20 days old; a run refers to the first of each."""
    for model in ("sd14", "sdxl"):
        folder = tmp_path / "store" / "images" / f"digest-of-{model}"
        describe(folder, {"model": model, "erasure": "cat, erased by uce, seed 0", "sampler": "DDIM"})
        rows = [ManifestRow(folder / f"{days}.png", "a cat", "erase", {}, 0) for days in (0, 10, 20)]
        for row, days in zip(rows, (0, 10, 20), strict=True):
            write_image(row.path, np.zeros((8, 8, 3), np.uint8))
            os.utime(row.path, (NOW - days * DAY - 60,) * 2)
        write_manifest(tmp_path / "runs" / model / "images" / "base.csv", rows[:1])
    return tmp_path / "store"


@pytest.fixture
def command(store, monkeypatch, capsys):
    """command(*arguments) -> what it prints."""

    def call(*arguments: str) -> str:
        monkeypatch.setenv("COLUMNS", "200")
        runs = [] if "--runs" in arguments else ["--runs", f"{store.parent}/runs"]
        monkeypatch.setattr(sys, "argv", ["unlearn-store", "--store", str(store), *runs, *arguments])
        main()
        return capsys.readouterr().out

    return call


def left(store: Path) -> set[str]:
    return {f"{p.parent.name.removeprefix('digest-of-')}/{p.stem}" for p in store.rglob("*.png")}


EVERYTHING = {f"{model}/{days}" for model in ("sd14", "sdxl") for days in (0, 10, 20)}
REFERRED_TO = {"sd14/0", "sdxl/0"}


def test_it_lists_images_by_model_and_erasure(command, store):
    said = command()
    line = next(line for line in said.splitlines() if "sd14" in line)
    assert "cat, erased by uce, seed 0" in line and "DDIM" in line and "digest-of-sd14" in line and " 3 " in line
    assert "6 images" in said and left(store) == EVERYTHING


def test_it_deletes_nothing_unless_asked_to(command, store):
    assert "4 of 6 images" in command("--prune") and "--delete" in command("--prune", "--all")
    assert left(store) == EVERYTHING


@pytest.mark.parametrize(
    ("arguments", "stay"),
    [
        ([], REFERRED_TO),
        (["--older-than", "15"], EVERYTHING - {"sd14/20", "sdxl/20"}),
        (["--all"], set()),
        (["--all", "--older-than", "15"], EVERYTHING - {"sd14/20", "sdxl/20"}),
        (["--down-to", "1GB"], EVERYTHING),
        (["--down-to", "0"], REFERRED_TO),
    ],
)
def test_it_deletes_what_it_lists(command, store, arguments, stay):
    command("--prune", *arguments)
    assert left(store) == EVERYTHING
    command("--prune", "--delete", *arguments)
    assert left(store) == stay
    assert len(list((store / "images").iterdir())) == len({name.partition("/")[0] for name in stay})


@pytest.mark.parametrize("text", ["", "prompt,role\na cat,erase\n", "path,prompt,role\n,a cat,erase\n", "\xff"])
def test_it_deletes_nothing_if_a_manifest_cannot_be_read(command, store, text):
    manifest = store.parent / "runs" / "sd14" / "images" / "base.csv"
    manifest.write_bytes(text.encode("latin-1"))
    with pytest.raises(SystemExit, match=str(manifest)):
        command("--prune", "--delete")
    assert left(store) == EVERYTHING


def test_it_deletes_the_oldest_images_down_to_a_size(command, store):
    total, one = sum(p.size for p in stored_images(store)), stored_images(store)[0].size
    command("--prune", "--down-to", f"{total - 2 * one}", "--delete")
    assert left(store) == EVERYTHING - {"sd14/20", "sdxl/20"}


def test_it_clears_away_what_a_killed_process_left(command, store):
    partial = store / "images" / "digest-of-sd14" / ".x.png.1234.partial"
    partial.write_bytes(b"half")
    command("--prune", "--delete")
    assert not partial.exists() and left(store) == REFERRED_TO


def test_it_waits_for_runs_that_are_at_work(command, store):
    run = store.parent / "runs" / "sd14"
    with alone_in(run), pytest.raises(SystemExit, match=str(run)):
        command("--prune", "--delete")
    assert left(store) == EVERYTHING
    command("--prune", "--delete")
    assert left(store) == REFERRED_TO, "a lock file that nobody holds stops nothing"


def test_runs_of_every_folder_that_drew_into_the_store_keep_their_images(unlearn, tmp_path, monkeypatch):
    small = ["dataset=prompt", "dataset.others=[dog]", "stages=[fit,generate]"]
    one = unlearn("-m", *small, f"paths.runs={tmp_path}/one") and tmp_path / "one"
    alone, gone = unlearn(*small, "seed=1", run="alone"), unlearn(*small, "seed=2", run="gone")
    shutil.rmtree(gone)
    (tmp_path / "given").mkdir()
    prune = ["unlearn-store", "--store", f"{tmp_path}/store", "--runs", f"{tmp_path}/given", "--prune", "--delete"]
    monkeypatch.setattr(sys, "argv", prune)
    [folder] = (path.parent for path in one.rglob("erasure"))
    for run in (folder, alone):
        with alone_in(run), pytest.raises(SystemExit, match=str(run)):
            main()
    assert len(stored_images(tmp_path / "store")) == 6
    main()
    left = {picture.path for picture in stored_images(tmp_path / "store")}
    assert left == {row.path for run in (folder, alone) for row in read_manifest(run / "images" / "base.csv")}


@pytest.mark.parametrize("content", [b"", b"elsewhere", b"\xff"])
def test_it_deletes_nothing_if_a_record_of_runs_is_damaged(command, store, tmp_path, content):
    note(store, tmp_path / "runs")
    [record] = (store / "runs").iterdir()
    record.write_bytes(content)
    with pytest.raises(SystemExit, match=f"{record} is damaged.*--runs"):
        command("--prune", "--delete")
    assert left(store) == EVERYTHING


def test_missing_folders_are_reported(command, store, tmp_path):
    with pytest.raises(SystemExit, match="--runs"):
        command("--prune", "--runs", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match="--store"):
        command("--store", str(tmp_path / "nowhere"))


def test_sizes_are_read_and_written():
    assert [in_bytes(t) for t in ("5GB", "200 mb", "1e3", "1.5K")] == [5e9, 2e8, 1e3, 1500]
    assert [in_units(n) for n in (0, 999, 1500, 5e9, 2e15)] == ["0 B", "999 B", "1.5 KB", "5 GB", "2e+03 TB"]

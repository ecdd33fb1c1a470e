"""The commit of each table row, from the records of the runs, and the exit status for scripts."""

import csv
import io
import json
import subprocess
import sys

import pytest

from unlearning.reporting.table import check
from unlearning.tracking.provenance import FILE


def process(commit="a" * 40, dirty=False, torch="2.9.0", cpu="a cpu") -> dict:
    packages = {"unlearning": "0.1.0", "torch": torch}
    return {
        **{"begun": "2026-01-01T00:00:00+00:00", "commit": commit, "dirty": dirty, "python": "3.12.1"},
        **{"packages": packages, "hardware": {"cpu": cpu, "gpus": []}},
    }


@pytest.fixture
def made(finished, tmp_path):
    """made("uce", [process, ...], [...]): one run for each seed, with a record for each process, or none."""

    def make(method: str, *seeds: list[dict]):
        for seed, processes in enumerate(seeds):
            run = finished(f"runs/{method}{seed}", method=method, seed=seed)
            if processes:
                (run / FILE).write_text(json.dumps({"seed": seed, "processes": processes}))
        return tmp_path / "runs"

    return make


def checked(folder) -> tuple[dict[str, tuple[str, str]], str, bool]:
    """{method: (made by, what differs)}, the notes, and whether all is well."""
    text, sound = check(folder, ["method"])
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines()[2:] if line[0:1] == "|"
    ]
    return {row[0]: (row[2], row[3]) for row in rows}, text.partition("\n\n")[2], sound


def test_rows_of_one_commit_are_sound(made):
    folder = made("uce", [process()], [process()])
    assert checked(made("esd_x", [process(commit="b" * 40)]))[0]["esd_x"] == ("b" * 10, "–")
    assert checked(folder) == ({"esd_x": ("b" * 10, "–"), "uce": ("a" * 10, "–")}, "", True)


def test_seeds_of_two_commits_are_marked(made):
    rows, notes, sound = checked(made("uce", [process()], [process(commit="b" * 40)], [process()]))
    assert rows["uce"] == (f"{'a' * 10} (seed 0, 2); {'b' * 10} (seed 1)†", "–")
    assert notes.startswith("†") and not sound


def test_a_run_that_two_commits_made_is_marked(made):
    rows, _, sound = checked(made("uce", [process(), process(commit="b" * 40)]))
    assert rows["uce"][0] == f"{'a' * 10} (seed 0); {'b' * 10} (seed 0)†" and not sound


def test_a_changed_tree_is_marked(made):
    rows, notes, sound = checked(made("uce", [process(dirty=True)]))
    assert rows["uce"][0] == f"{'a' * 10}, changed‡" and notes.startswith("‡") and not sound


def test_a_run_without_a_record_is_marked(made):
    rows, notes, sound = checked(made("uce", []))
    assert rows["uce"][0] == "not recorded§" and notes.startswith("§") and not sound
    assert checked(made("esd_x", [process()], []))[0]["esd_x"][0] == f"{'a' * 10} (seed 0); not recorded (seed 1)†§"


@pytest.mark.parametrize(
    "record", [{"processes": [1]}, {"processes": [{}]}, {"processes": [], "stored": {"images": [1]}}]
)
def test_an_invalid_record_counts_as_missing(made, record):
    folder = made("uce", [process()])
    (folder / "uce0" / FILE).write_text(json.dumps(record))
    rows, notes, sound = checked(folder)
    assert rows["uce"][0] == "not recorded§" and notes.startswith("§") and not sound


def test_the_commit_of_images_from_the_store_is_named(made):
    folder = made("uce", [process()], [process()])
    record = folder / "uce1" / FILE
    other, changed = {**process(commit="b" * 40)}, {**process(commit="c" * 40, dirty=True)}

    def stored(**codes: list) -> tuple[str, bool]:
        record.write_text(json.dumps({"processes": [process()], "stored": codes}))
        rows, _, sound = checked(folder)
        return rows["uce"][0], sound

    a, b, c = ("abc"[i] * 10 for i in range(3))
    assert stored(pictures=[process()]) == (a, True)
    assert stored(pictures=[other]) == (f"{a} (seed 0, 1); pictures by {b} (seed 1)†", False)
    assert stored(evaluations=[changed]) == (f"{a} (seed 0, 1); evaluations by {c}, changed (seed 1)†‡", False)
    assert stored(pictures=[None]) == (f"{a} (seed 0, 1); pictures by unknown (seed 1)†", False)


def test_an_installed_package_is_named_by_its_version_and_marked_as_without_commit(made):
    installed = process(commit=None, dirty=None)
    folder = made("uce", [installed])
    rows, notes, sound = checked(folder)
    assert rows["uce"][0] == "unlearning 0.1.0¶" and notes.startswith("¶") and not sound
    (folder / "uce0" / FILE).write_text(json.dumps({"processes": [process()], "stored": {"pictures": [installed]}}))
    assert checked(folder)[0]["uce"][0].endswith("pictures by unlearning 0.1.0 (seed 0)†¶")


def test_differing_versions_and_hardware_are_named_but_not_marked(made):
    rows, _, sound = checked(made("uce", [process()], [process(torch="2.8.0", cpu="another")]))
    assert rows["uce"][1] == "torch 2.9.0 \\| 2.8.0; cpu a cpu \\| another" and sound


def test_the_exit_status(made):
    command = [sys.executable, "-m", "unlearning.reporting.table", "--check", "--by", "method", "--format", "csv"]
    folder = made("uce", [process()])
    done = subprocess.run([*command, "--", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [row["made by"] for row in csv.DictReader(io.StringIO(done.stdout))] == ["a" * 10]
    made("esd_x", [process(dirty=True)])
    assert subprocess.run([*command, "--", str(folder)], capture_output=True).returncode == 1

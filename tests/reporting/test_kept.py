"""Results of runs stored in a CSV file, and the table made from it."""

import sys

import pytest

from experiments import kept
from unlearning.errors import UserError

HEAD = "method,seed,efficacy/acc_e,cost/seconds\n"


@pytest.fixture
def keep(tmp_path, monkeypatch):
    """keep(*folder) -> (the file, the README) after the command; the file has two runs of `none` at first."""
    file, readme = tmp_path / "key.csv", tmp_path / "README.md"
    file.write_text(f"{HEAD}uce,0,5,\nnone,0,100,0\nnone,1,90,0\n")
    readme.write_text("before\n<!-- key -->\nold\n<!-- /key -->\nafter\n")

    def call(*folder):
        monkeypatch.setattr(sys, "argv", ["kept", str(file), *map(str, folder)])
        kept.main()
        return file.read_text(), readme.read_text()

    return call


def rows(readme: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in readme.splitlines() if "`" in line]
    return {line[0]: line[1:] for line in lines}


def test_seeds_are_averaged_and_controls_come_first(keep):
    file, readme = keep()
    assert file == f"{HEAD}none,0,100,0\nnone,1,90,0\nuce,0,5,\n"
    assert readme.startswith("before\n<!-- key -->\n|") and readme.endswith("<!-- /key -->\nafter\n")
    assert list(rows(readme)) == ["method", "`none`", "`uce`"]
    assert rows(readme)["`none`"][:2] == ["2", "95.0 ± 5.0"] and rows(readme)["`uce`"] == ["1", "5.0", "–"]


def test_runs_of_a_folder_take_the_place_of_earlier_ones(keep, finished_in, tmp_path):
    metrics = {"efficacy/acc_e": 7.5, "cost/seconds": 9.0}
    finished_in(tmp_path / "runs", "a", metrics, method="uce")
    finished_in(tmp_path / "runs", "b", {"fidelity/fid": 3.0}, method="spm")
    file, readme = keep(tmp_path / "runs")
    assert file.endswith("none,1,90,0\nuce,0,7.5,9\n"), "a run that measured nothing of this is no line"
    assert rows(readme)["`uce`"] == ["1", "7.5", "9.00 s"]


def test_two_runs_that_disagree_are_refused(keep, finished_in, tmp_path):
    for place, value in (("a", 1.0), ("b", 2.0)):
        finished_in(tmp_path / "runs", place, {"efficacy/acc_e": value}, method="uce")
    with pytest.raises(UserError, match="uce, 0 has other numbers"):
        keep(tmp_path / "runs")


def test_numbers_that_a_run_lacks_stay(keep, finished_in, tmp_path):
    """A run that measured one attack again, or two runs with an attack each."""
    finished_in(tmp_path / "runs", "a", {"efficacy/acc_e": 80.0}, method="none")
    for place, metrics in (("b", {"efficacy/acc_e": 1.0}), ("c", {"cost/seconds": 2.0})):
        finished_in(tmp_path / "runs", place, metrics, method="spm")
    file, _ = keep(tmp_path / "runs")
    assert file == f"{HEAD}none,0,80,0\nnone,1,90,0\nspm,0,1,2\nuce,0,5,\n"

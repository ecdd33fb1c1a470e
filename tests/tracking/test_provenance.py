"""The provenance record of a run: code, machine and data, with and without a git checkout."""

import json
import subprocess

import pytest

from unlearning.tracking import provenance


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """git(*words) in a repository with one commit of unlearning/a.py; `git.root` is its folder."""
    for name in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE"):
        monkeypatch.delenv(name, raising=False)

    def git(*words: str) -> str:
        own = ("-c", "user.name=a", "-c", "user.email=a@b")
        return subprocess.run(["git", "-C", git.root, *own, *words], capture_output=True, text=True, check=True).stdout

    git.root = tmp_path / "project"
    (git.root / "unlearning").mkdir(parents=True)
    (git.root / "unlearning" / "a.py").write_text("1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "first")
    return git


def test_a_clean_checkout_has_a_commit(checkout):
    found = provenance.repository(checkout.root)
    assert found == {"commit": checkout("rev-parse", "HEAD").strip(), "dirty": False}


@pytest.mark.parametrize(
    ("file", "dirty"), [("unlearning/a.py", True), ("unlearning/new.py", True), ("conf/x.yaml", True), ("notes", False)]
)
def test_a_tree_is_dirty_if_files_that_results_depend_on_have_changed(checkout, file, dirty):
    path = checkout.root / file
    path.parent.mkdir(exist_ok=True)
    path.write_text("2\n")
    assert provenance.repository(checkout.root)["dirty"] is dirty


def test_a_folder_that_is_not_a_checkout_has_no_commit(checkout, tmp_path):
    nothing = {"commit": None, "dirty": None}
    assert provenance.repository(checkout.root / "unlearning") == nothing, (
        "the repository above belongs to another project"
    )
    (tmp_path / "broken" / ".git").mkdir(parents=True)
    assert provenance.repository(tmp_path / "broken") == nothing


def test_versions_and_hardware_are_those_of_this_process():
    import torch

    now = provenance.circumstances()
    assert (
        now["packages"]["torch"] == torch.__version__.partition("+")[0] or now["packages"]["torch"] == torch.__version__
    )
    assert now["hardware"]["cpu"] and now["hardware"]["cores"] >= 1 and now["hardware"]["memory"] > 2**28
    assert len(now["hardware"]["gpus"]) == torch.cuda.device_count()
    assert json.loads(json.dumps(now)) == now


def test_a_session_is_added_if_more_than_the_time_changed():
    first = {"begun": "1", "commit": "a", "python": "3.11"}
    known = provenance.joined({}, first, {"seed": 0, "data": "d"})
    assert known == {"seed": 0, "data": "d", "processes": [first]}
    assert provenance.joined(known, {**first, "begun": "2"}, {"seed": 0}) == known
    other = {**first, "begun": "3", "commit": "b"}
    assert provenance.joined(known, other, {})["processes"] == [first, other]
    assert provenance.joined(known, other, {"seed": 0, "data": "e"}) == {"seed": 0, "data": "e", "processes": [other]}


def test_a_run_keeps_its_record_and_adds_to_it(unlearn, monkeypatch):
    run = unlearn("dataset=prompt", "dataset.others=[dog]", "stages=[fit,generate]")
    first = provenance.read(run)
    assert first["seed"] == 0 and len(first["model"]) > 8 and len(first["data"]) == 16
    [process] = first["processes"]
    assert process["commit"] == provenance.repository()["commit"] and process["packages"]["diffusers"]

    unlearn("dataset=prompt", "dataset.others=[dog]")
    assert provenance.read(run) == first, "the same process, the same machine: one process"

    now = {**provenance.circumstances(), "commit": "another"}
    monkeypatch.setattr(provenance, "circumstances", lambda: now)
    (run / "report.html").unlink()
    unlearn("dataset=prompt", "dataset.others=[dog]", "stages=[report]")
    assert provenance.read(run) == first and (run / "report.html").exists(), "a report is not a result"
    unlearn("dataset=prompt", "dataset.others=[dog]", "stages=[evaluate]", "evaluator=nudenet")
    again = provenance.read(run)
    assert [s["commit"] for s in again.pop("processes")] == [process["commit"], "another"]
    assert again.items() <= first.items()

    unlearn("dataset=prompt", "dataset.others=[dog,sky]", "stages=[fit]")
    anew = provenance.read(run)
    assert anew["data"] != first["data"] and [s["commit"] for s in anew["processes"]] == ["another"]


def test_a_run_records_the_code_that_made_what_it_took_from_the_store(unlearn, tmp_path, monkeypatch):
    command = ["dataset=prompt", "dataset.others=[dog]", "evaluator=nudenet", "stages=[fit,generate,evaluate]"]

    def run_by(commit: str, *overrides: str, run: str) -> dict:
        now = {**provenance.circumstances(), "commit": commit}
        monkeypatch.setattr(provenance, "circumstances", lambda: now)
        return provenance.read(unlearn(*command, *overrides, run=run))

    def commits(record: dict) -> dict[str, list]:
        return {kind: [code and code["commit"] for code in codes] for kind, codes in record["stored"].items()}

    assert commits(run_by("first", run="one")) == {}
    assert commits(run_by("second", run="two")) == {"pictures": ["first"], "evaluations": ["first"]}
    run_by("third", "dataset.others=[dog,sky]", "stages=[fit,generate]", run="three")
    both = run_by("fourth", "dataset.others=[sky]", run="four")
    assert commits(both) == {"pictures": ["first", "third"]}, "it has made the evaluation itself"
    own = run_by("second", "seed=1", "stages=[fit,generate]", run="one")
    assert commits(own) == {}, "other images in the same folder do not matter"

    for path in (tmp_path / "store").rglob("drawn-by/*"):
        path.unlink()
    for path in (tmp_path / "store" / "evaluations").glob("*.json"):
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "made by"}))
    assert commits(run_by("second", run="five")) == {"pictures": [None], "evaluations": [None]}

"""The cost of a stage, and the machine."""

import gc
import json
import os

import numpy as np
import pytest
import torch

from unlearning.reporting.comparison import Comparison
from unlearning.reporting.runs import FinishedRun
from unlearning.tracking import cost

MEGABYTE = 2**20


class Model:
    def __init__(self):
        self.network, self.device = torch.nn.Identity(), torch.device("cpu")


@pytest.fixture
def fitted(tmp_path):
    """fitted(megabytes, name) -> the cost metrics of a fit that holds so much memory and calls the denoiser twice."""

    def fit(megabytes=0, name="a"):
        path, model = tmp_path / f"{name}.json", Model()
        with cost.measured(path, "fit", model):
            held = np.ones(megabytes * MEGABYTE, np.uint8)
            for _ in range(2):
                model.network(torch.zeros(3, 1))
            del held
            gc.collect()
        return cost.metrics(path, tmp_path / "erasure")

    return fit


@pytest.fixture
def threads():
    """Sets the number of torch's threads for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_a_second_start_adds_to_the_cost(fitted):
    first, both = fitted(), fitted()
    assert first["cost/denoiser_evaluations"].value == 6 and both["cost/denoiser_evaluations"].value == 12
    assert both["cost/seconds"].value > first["cost/seconds"].value > 0 and first["cost/artefact_bytes"].value == 0


def test_costs_are_written_during_the_stage(fitted, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "WRITE_EVERY", 0)
    path, model = tmp_path / "a.json", Model()
    fitted()
    with cost.measured(path, "fit", model):
        model.network(torch.zeros(3, 1))
        assert json.loads(path.read_text())["fit"]["denoiser_evaluations"] == 6 + 3
    assert json.loads(path.read_text())["fit"]["denoiser_evaluations"] == 6 + 3


def test_a_small_job_after_a_large_one_has_its_own_peak(fitted):
    large, small = (fitted(megabytes, str(megabytes))["cost/peak_memory"].value for megabytes in (300, 20))
    assert large - small > 200 * MEGABYTE and small > 20 * MEGABYTE


@pytest.mark.parametrize("readable", [False, True])
def test_an_unknown_peak_is_left_out(fitted, monkeypatch, tmp_path, readable):
    monkeypatch.setattr(cost, "PROCESS", tmp_path / "proc")
    if readable:
        (tmp_path / "proc").mkdir()
        (tmp_path / "proc" / "status").write_text("VmRSS: 12 kB\n")
    metrics = fitted()
    assert not any("peak_memory" in name for name in metrics) and metrics["cost/seconds"].value > 0


def test_every_cost_has_a_protocol(fitted, threads):
    threads(1)
    metrics = fitted()
    assert {*metrics} == {*cost.METRICS} and all(metric.protocol for metric in metrics.values())
    assert metrics["cost/seconds"].protocol.startswith("of the fit, on ")
    assert metrics["cost/seconds"].protocol.endswith(", 1 torch thread")


def test_the_protocol_names_every_machine(fitted, threads, tmp_path):
    for count in (1, 2, 2):
        threads(count)
        metrics = fitted()
    assert metrics["cost/seconds"].protocol.count(" torch thread") == 2
    assert len(json.loads((tmp_path / "a.json").read_text())["fit"]["on"]) == 2


def test_the_protocol_says_how_often_a_fit_began_and_what_a_kill_lost(fitted, tmp_path):
    once, twice = fitted()["cost/seconds"].protocol, fitted()["cost/denoiser_evaluations"].protocol
    assert "begun" not in once and "begun 2 times" in twice and "killed" not in twice
    if (pid := os.fork()) == 0:
        with cost.measured(tmp_path / "a.json", "fit", Model()):
            os._exit(1)
    os.waitpid(pid, 0)
    for start in (4, 5):
        protocol = fitted()["cost/seconds"].protocol
        assert f"begun {start} times" in protocol and "killed" in protocol


def test_costs_of_an_older_record_are_read_without_a_protocol(tmp_path):
    (tmp_path / "cost.json").write_text(json.dumps({"fit": {"seconds": 3.0}}))
    metrics = cost.metrics(tmp_path / "cost.json", tmp_path / "erasure")
    assert metrics["cost/seconds"].value == 3.0 and not metrics["cost/seconds"].protocol


def test_a_table_marks_seconds_of_another_machine(fitted, threads, tmp_path):
    runs = []
    for method, count in (("uce", 1), ("esd_x", 1), ("esd_u", 2)):
        threads(count)
        settings = {"model": "m", "dataset": "d", "concept": "cat", "method": method, "seed": 0}
        runs.append(FinishedRun(tmp_path, settings, fitted(name=method)))
    table = Comparison(runs, ["method"], ["cost/seconds", "cost/denoiser_evaluations"]).table
    marks = {line[0].text: [cell.marks for cell in line[2:]] for line in table.lines}
    assert marks == {"uce": [(), ()], "esd_x": [(), ()], "esd_u": [("†",), ()]}
    assert any("cost/seconds of esd_u" in note.text and "2 torch threads" in note.text for note in table.notes)

"""Metrics as records in memory and flat keys on disk."""

import pytest

from unlearning.errors import UserError
from unlearning.store.metrics import Metric, flat, read, records, write

METRICS = {
    "efficacy/acc_e": Metric(5.0, "argmax", False, 100.0, "argmax of base"),
    "cost/seconds": Metric(0, "on a CPU"),
    "summary/h_o": Metric(None, "", True, 1.5, "argmax"),
}


def test_flat_and_records_are_inverse():
    assert records(flat(METRICS)) == METRICS
    assert flat(METRICS)["efficacy/acc_e/better"] == "lower" and flat(METRICS)["base/efficacy/acc_e"] == 100.0


def test_a_file_is_read_as_it_was_written(tmp_path):
    write(tmp_path / "metrics.json", METRICS)
    assert read(tmp_path / "metrics.json") == METRICS
    with pytest.raises(ValueError):
        write(tmp_path / "metrics.json", {"a/b": Metric(float("nan"))})
    assert read(tmp_path / "metrics.json") == METRICS, "whole or not at all"


def test_non_finite_values_are_not_metrics():
    assert records({"a/b": None, "a/c": True, "a/d": float("nan"), "a/e": "text", "a/f": 1}) == {"a/f": Metric(1)}


@pytest.mark.parametrize(
    ("value", "base", "higher_is_better", "change", "improved"),
    [(5.0, 100.0, False, -95.0, True), (5.0, 100.0, True, -95.0, False), (5.0, 5.0, True, 0.0, None),
     (5.0, 4.0, None, 1.0, None), (5.0, None, True, None, None), (None, 5.0, True, None, None)],
)  # fmt: skip
def test_a_change_is_an_improvement_in_the_metrics_direction(value, base, higher_is_better, change, improved):
    metric = Metric(value, higher_is_better=higher_is_better, base=base)
    assert (metric.change, metric.improved) == (change, improved)


def test_the_base_models_metric_as_its_own():
    assert METRICS["efficacy/acc_e"].of_base() == Metric(100.0, "argmax of base", False)


@pytest.mark.parametrize("content", [None, "", "{", "[]", "{}"])
def test_a_missing_or_damaged_file_names_the_stage_that_writes_it(tmp_path, content):
    path = tmp_path / "metrics.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"metrics\.json.* evaluate"):
        read(path)

"""The share of images for which w is on the correct side of 1/2."""

from pathlib import Path

import numpy as np
import pytest

from unlearning.concepts import ERASE, RETAIN, SYNONYM
from unlearning.evaluators.routing import Routing
from unlearning.store.manifest import ManifestRow


def measured(*decided: tuple[str, float]) -> dict[str, float]:
    metric = Routing()
    rows = [ManifestRow(Path("x"), "p", role, {}, 0, None, {"D": 1.0, "w": w}) for role, w in decided]
    metric.update(np.zeros((len(rows), 1, 1, 3), np.uint8), rows)
    return metric.compute()


def test_correct_routing_is_the_adapter_for_the_concept_and_the_base_model_otherwise():
    numbers = measured((ERASE, -1.0), (SYNONYM, -1.0), (SYNONYM, 2.0), (RETAIN, 2.0), (RETAIN, 1.0), (RETAIN, -1.0))
    assert numbers == {
        "efficacy/routed_e": 100.0,
        "efficacy/routed_g": 50.0,
        "retention/routed_s": pytest.approx(200 / 3),
    }
    assert set(numbers) == set(Routing.higher_is_better)


def test_rows_without_a_decision_or_with_another_role_are_skipped():
    metric = Routing()
    metric.update(np.zeros((1, 1, 1, 3), np.uint8), [ManifestRow(Path("x"), "p", ERASE, {}, 0)])
    assert metric.compute() == {} == measured(("another role", 2.0))

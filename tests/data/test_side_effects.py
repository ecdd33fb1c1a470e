"""Side effects of an erasure: neighbours, compositions, descriptions, other languages."""

import json
from collections import Counter

import pytest

from unlearning.concepts import ERASE, RETAIN, SYNONYM
from unlearning.data.openmoji import CIFAR10, OBJECTS
from unlearning.data.side_effects import COMPOSITION, IMPLICIT, LANGUAGE, NEIGHBOUR, emoji_side_effects
from unlearning.data.words import neighbours
from unlearning.errors import UserError


def test_every_object_has_neighbours_that_are_other_objects():
    assert neighbours().keys() == OBJECTS.keys()
    for name, near in neighbours().items():
        assert len(set(near)) == 3 and name not in near and set(near) <= OBJECTS.keys()


@pytest.mark.parametrize("concept", [*OBJECTS, ["cat", "tiger"]])
def test_no_prompt_repeats_and_no_evaluated_concept_is_retained(concept):
    task = emoji_side_effects(concept)
    assert max(Counter(p.text.casefold() for p in task.prompts).values()) == 1
    erased = {c.name for c in task.erase}
    for p in task.prompts:
        assert (p.labels["object"] in erased) == (p.role in (ERASE, SYNONYM, IMPLICIT, LANGUAGE))
    kept = {p.labels["object"] for p in task.prompts if p.role in (RETAIN, NEIGHBOUR, COMPOSITION)}
    assert not kept & {c.name for c in task.retain} and not kept & erased


def test_a_composition_contains_the_concept_and_evaluates_the_other_object():
    task = emoji_side_effects("cat", beside=5)
    beside = {p.labels["object"]: p.text for p in task.prompts if p.role == COMPOSITION}
    assert list(beside)[:3] == neighbours()["cat"] and set(list(beside)[3:]) <= set(CIFAR10)
    assert beside["tiger"] == "a photo of the cat and the tiger"
    implied = [p.text for p in task.prompts if p.role in (IMPLICIT, LANGUAGE)]
    assert "a photo of the pet that meows" in implied and "a photo of the gato" in implied
    assert not any("cat" in text.split() for text in implied)


def test_an_unknown_object_is_refused():
    with pytest.raises(UserError, match="no object"):
        emoji_side_effects("kat")


def test_each_role_has_a_number(unlearn):
    few = ["dataset=emoji_side_effects", "concept=rabbit", "evaluator=accuracy", "dataset.beside=1"]
    metrics = json.loads((unlearn(*few, "stages=[fit,generate,evaluate]") / "metrics.json").read_text())
    for role in (NEIGHBOUR, COMPOSITION):
        assert 0 <= metrics[f"accuracy/{role}"] <= 100

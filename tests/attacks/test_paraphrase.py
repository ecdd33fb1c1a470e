"""Paraphrases: other words for the concept; the images of a prompt use them in turn."""

import re
from collections import Counter
from pathlib import Path

import pytest

from unlearning.attacks.paraphrase import KINDS, Paraphrase, in_turn, misspelt
from unlearning.concepts import ERASE, Concept, Prompt, UnlearningTask
from unlearning.data.imagenette import CLASSES
from unlearning.data.openmoji import OBJECTS
from unlearning.data.words import paraphrases
from unlearning.errors import UserError
from unlearning.models.dit import DiT
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.store.manifest import manifest, read_manifest

CAT, UNKNOWN = Concept("cat", ("pussycat",)), Concept("zorblax")


@pytest.fixture
def model(sd1):
    return StableDiffusion.load(str(sd1), device="cpu")


def rows_of(*texts: str, images: int = 1, concepts=(CAT,)):
    prompts = tuple(Prompt(text, ERASE, concept=c.name) for c in concepts for text in texts)
    task = UnlearningTask(erase=concepts, prompts=prompts, images_per_prompt=images)
    return task, manifest(Path("images"), task, 0)


@pytest.mark.parametrize("name", [*OBJECTS, *CLASSES, "Van Gogh", "Picasso", "nudity"])
def test_every_listed_concept_has_each_kind_and_no_paraphrase_contains_its_name(name):
    words = Paraphrase().words(Concept(name))
    same = {"languages"} if name == "pizza" else set()  # in all five
    assert {kind for kind, _ in words} == set(KINDS) - same
    assert not any(text.casefold() == name.casefold() for _, text in words)
    described = [text for kind, text in words if kind == "descriptions"]
    assert not any(re.search(rf"\b{name}\b", text, re.IGNORECASE) for text in described)
    assert len({text.casefold() for _, text in words}) == len(words)


def test_the_lists_have_nothing_but_the_kinds_in_five_languages():
    for lists in paraphrases().values():
        assert lists.keys() == set(KINDS) - {"misspellings"}
        assert lists["languages"].keys() == {"es", "fr", "de", "it", "pt"}


def test_the_images_of_a_prompt_get_every_paraphrase_before_any_twice(model):
    number = len(Paraphrase().words(CAT))
    task, rows = rows_of("a photo of the cat", images=2 * number)
    found = Paraphrase().find(model, task, rows, None).prompts
    assert [(one.target, one.seed) for one in found] == [(row.prompt, row.seed) for row in rows]
    assert set(Counter(one.prompt for one in found).values()) == {2}
    assert len({one.record["kind"] for one in found[: len(KINDS)]}) == len(KINDS)
    assert found[0].prompt == "a photo of the pussycat" and "gato" in {one.record["words"] for one in found}


def test_prompts_of_one_image_share_the_paraphrases_of_their_concept(model):
    task, rows = rows_of("a cat", "Cat, and a catfish", "a sofa", concepts=(CAT, Concept("dog")))
    found = Paraphrase(kinds=("languages",)).find(model, task, rows, None).prompts
    assert [one.prompt for one in found[:3]] == ["a gato", "chat, and a catfish", "Katze a sofa"]
    assert [one.record["words"] for one in found[3:]] == ["perro", "chien", "Hund"]


def test_chosen_kinds_are_the_only_ones():
    words = Paraphrase(kinds=("misspellings", "hypernyms"), count=3).words(CAT)
    assert [kind for kind, _ in words] == ["misspellings", "hypernyms"] * 2 + ["misspellings"]


def test_a_concept_outside_the_lists_is_misspelt_and_lacks_what_was_chosen(model):
    assert {kind for kind, _ in Paraphrase().words(UNKNOWN)} == {"misspellings"}
    assert {kind for kind, _ in Paraphrase().words(Concept("zorblax", ("blorp",)))} == {"synonyms", "misspellings"}
    task, rows = rows_of("a zorblax", concepts=(UNKNOWN,))
    with pytest.raises(UserError, match=r"languages.*'zorblax'.*misspellings"):
        Paraphrase(kinds=("misspellings", "languages")).find(model, task, rows, None)


def test_misspellings_differ_from_the_name_in_one_place_and_depend_on_the_seed():
    texts = list(misspelt("cat", 0))
    assert texts == list(misspelt("cat", 0)) and texts != list(misspelt("cat", 1))
    assert len(set(texts)) == len(texts) and "cat" not in texts
    assert {"ct", "ccat", "act"} <= set(texts) and all(2 <= len(text) <= 4 for text in texts)
    assert all(" " in text for text in misspelt("Van Gogh", 0))
    assert set(misspelt("q", 0)) > {"qq"} and "" not in misspelt("q", 0)


def test_lists_take_turns():
    assert in_turn(["ab", "", "cde"]) == ["a", "c", "b", "d", "e"]


@pytest.mark.parametrize("any_pipeline", ["sd3", "dit"], indirect=True)
def test_families_that_read_text_are_attacked(any_model):
    task, rows = rows_of("a cat", images=3)
    if isinstance(any_model, DiT):
        with pytest.raises(UserError, match="classes"):
            Paraphrase().find(any_model, task, rows, None)
    else:
        assert len(Paraphrase().find(any_model, task, rows, None).prompts) == 3


def test_prompts_that_the_text_encoder_may_have_cut_are_counted(model, caplog):
    task, rows = rows_of("a cat", "a cat on a sofa on a sofa on a sofa on a sofa")
    assert Paraphrase().find(model, task, rows, None).record["filling"] == 1
    assert "1 of 2" in caplog.text


def test_a_run_draws_the_paraphrases(unlearn):
    chosen = ["dataset=prompt", "dataset.images_per_prompt=2", "concept=rabbit", "stages=[fit,attack,generate]"]
    run = unlearn("attack=[paraphrase]", *chosen)
    rows = read_manifest(run / "images" / "attacked-paraphrase.csv")
    assert [row.prompt for row in rows] == ["a photo of the bunny", "a photo of the animal"]
    assert all(row.path.exists() and row.comeback is None for row in rows)

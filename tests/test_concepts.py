"""What can be the name of a concept."""

import logging

import pytest

from tests.config.test_quoting import read, words
from unlearning.concepts import concept_names
from unlearning.config.naming import slug
from unlearning.data.prompt import task
from unlearning.errors import UserError
from unlearning.store.finished import state


@pytest.mark.parametrize(
    "name",
    [
        None,
        "",
        "  ",
        ".",
        "..",
        "/root",
        "~/x",
        "./x",
        "../x",
        3.1,
        True,
        "a\nb",
        "a\0b",
        "a\x1b[1m",
        "\ud800",
        "a\u2028b",
    ],
)
def test_what_is_no_name_is_refused(name):
    for given in (name, ["cat", name]):
        with pytest.raises(UserError):
            concept_names(given)


@pytest.mark.parametrize("name", ["cat", "AC/DC", "[b]x[/b]", "O'Keeffe", "猫", "🐱", "C#", "=1+1", "St. Ives"])
def test_any_text_is_a_name(name):
    assert concept_names(name) == (name,)


def test_a_whole_number_of_a_file_is_a_name():
    assert concept_names([1984, "cat", "1984"]) == ("1984", "cat")


def test_other_words_are_names_too():
    blank = ({"others": [""]}, {"synonyms": [" "]}, {"synonyms": {"cat": [""]}}, {"retain": ["dog", "\t"]})
    for words_ in ({"others": ["../x"]}, {"synonyms": [True]}, {"retain": [3.1]}, *blank):
        with pytest.raises(UserError):
            task("cat", **words_)


def test_a_name_with_commas_is_one_concept_and_this_is_said(caplog):
    with caplog.at_level(logging.WARNING):
        assert concept_names("violence, nudity, harm") == ("violence, nudity, harm",)
    [line] = words(caplog.messages[0].partition("type ")[2])
    assert read(line) == ["violence", "nudity", "harm"]


@pytest.mark.parametrize("name", [".", "..", "/", "...", "", "猫/犬"])
def test_a_folder_that_is_named_after_a_concept_lies_where_it_should(name):
    assert slug(name).strip(".") and "/" not in slug(name)


def test_a_concept_that_is_called_like_a_folder_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "data"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    names = {"concept": "cat", "others": ["cat"], "retain": ["cat"], "forget": "data"}
    method = {"retained": ["cat"], "words": ["cat"], "subjects": ["cat"], "concepts": ["cat"]}
    attack = {"mma": {"banned": ["cat"]}, "cce": {"initial": "cat", "prompts": ["cat"]}}
    files = state({"dataset": names, "method": method, "attack": attack})
    assert [path for path, _, _ in files] == ["data/file"]
    assert [path for path, _, _ in state({"dataset": {"retain": "cat"}})] == ["cat/file"]


def test_a_file_that_a_setting_names_from_home_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "erased.pt").write_bytes(b"one")
    before = state({"method": {"path": "~/erased.pt"}})
    assert [path for path, _, _ in before] == [str(tmp_path / "erased.pt")]
    (tmp_path / "erased.pt").write_bytes(b"another")
    assert state({"method": {"path": "~/erased.pt"}}) != before
    assert state({"a": "~", "b": "~/", "c": "/"}) == [], "no disk is walked"

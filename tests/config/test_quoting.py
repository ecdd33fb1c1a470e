"""Names are parsed as text, and the commands that messages suggest work in a real shell."""

import shlex
import subprocess

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import OverrideParseException
from omegaconf import OmegaConf

from unlearning.__main__ import CONF
from unlearning.config.quoting import readable, typed
from unlearning.config.suggestions import explain

NAMES = [
    "cat", "Van Gogh", "cat's", "C#", "a=b", "f(x)", "cat (animal)", "猫", "🐱 cat", 'say "hi"', "it's \"x\"", "1984",
    "3.10", "true", "null", "50%", "$5", "a!b's", "a`b`", "a\\", "a\\'b", "\\", "~x", "a, b", "[b]", "{x}", "${seed}",
    "a: b", " lead", "a;b", "é", "choice(a,b)", "-m", "",
]  # fmt: skip


def read(word: str) -> object:
    """The value that Hydra and OmegaConf make of an override."""
    [override] = OverridesParser.create().parse_overrides([word])
    return OmegaConf.to_container(OmegaConf.create({"value": override.value()}), resolve=True)["value"]


def words(line: str) -> list[str]:
    """The words that bash makes of the rest of a command line."""
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True)
    return done.stdout.split("\0")[:-1]


def test_a_suggested_command_gives_the_value_in_a_real_shell():
    values = [*NAMES, *([name, "dog"] for name in NAMES), {"Van Gogh": ["a, b"], "cat": []}, 3, 0.5]
    lines = words(" ".join(typed("concept", value) for value in values))
    assert [read(line) for line in lines] == values


@pytest.mark.parametrize(
    "name",
    [
        "cat's",
        "C#",
        "a=b",
        "f(x)",
        "cat (animal)",
        "猫",
        "🐱 cat",
        'say "hi"',
        "a!b's",
        "é",
        "[b]cat[/b]",
        "'t",
        "{x",
        "[a",
    ],
)
def test_the_message_about_an_unreadable_name_has_the_line_to_type(name):
    override = f"concept={name}"
    with pytest.raises(OverrideParseException) as error:
        OverridesParser.create().parse_overrides(readable([override]))
    [line] = words(explain(error.value, CONF, [override]).partition("type ")[2])
    assert read(line) == name


@pytest.mark.parametrize("character", ["\udcc3", "\n", "\x07"])
def test_the_error_names_a_character_that_quotes_cannot_protect(error_of, character):
    message = error_of(f"concept=a{character}b")
    assert ascii(character) in message and "type" not in message and message.strip().isascii()


def test_a_list_split_by_the_shell_is_joined():
    taken = ["concept=[cat,", "Van", "Gogh]", "method=uce"]
    with pytest.raises(OverrideParseException) as error:
        OverridesParser.create().parse_overrides(taken)
    [line] = words(explain(error.value, CONF, taken).partition("type ")[2])
    assert read(line) == ["cat", "Van Gogh"]


def test_a_name_with_commas_is_explained(error_of):
    several, one, _ = error_of("concept=violence, nudity, harm").strip().splitlines()
    [line] = words(several.partition("type ")[2])
    assert read(line) == ["violence", "nudity", "harm"]
    [line] = words(one.partition("type ")[2])
    assert read(line) == "violence, nudity, harm"


@pytest.mark.parametrize("several", ["stages=fit", "dataset.others=dog"])
def test_a_list_of_one_is_explained(error_of, several):
    [line] = words(error_of("dataset=prompt", several).partition("Type ")[2])
    setting, _, value = several.partition("=")
    assert line.startswith(setting) and read(line) == [value]


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("concept=1984", "1984"),
        ("concept=3.10", "3.10"),
        ("concept=true", "true"),
        ("concept=1e5", "1e5"),
        ("concept=nan", "nan"),
        ("concept=1_000", "1_000"),
        ("concept=null", None),
        ("concept=10 cats", "10 cats"),
        ("+concept=3.10", "3.10"),
        ("concept=[cat, 3.10,No]", ["cat", "3.10", "No"]),
        ("concept='a, 3.10'", "a, 3.10"),
        ("dataset.synonyms={1984: [2.0, x]}", {1984: ["2.0", "x"]}),
        ("seed=3", 3),
    ],
)
def test_a_name_is_text_from_the_start(word, value):
    assert [read(w) for w in readable([word])] == [value]


def test_every_name_of_a_sweep_is_text():
    [word] = readable(["concept=cat,1984,3.10"])
    [override] = OverridesParser.create().parse_overrides([word])
    assert [shlex.split(value)[0] for value in override.sweep_string_iterator()] == ["cat", "1984", "3.10"]


@pytest.mark.parametrize(
    ("word", "value"), [("model.path=~/sd", "{}/sd"), ("after=[~/a,b,~/c]", ["{}/a", "b", "{}/c"]), ("x=a~/b", None)]
)
def test_the_home_folder_may_begin_a_path(monkeypatch, word, value):
    monkeypatch.setenv("HOME", "/home/me")
    [again] = readable([word])
    if value is None:
        assert again == word
    else:
        assert str(read(again)) == str(value).replace("{}", "/home/me")

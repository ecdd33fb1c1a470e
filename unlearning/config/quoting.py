"""Settings as a user types them in a shell: values are quoted where needed, and names are always read as text."""

import os
import re
import shlex
import unicodedata
from collections.abc import Mapping, Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

# Settings that hold names.
NAMES = {"concept", "dataset.others", "dataset.retain", "dataset.synonyms", "dataset.anchor"}
# A name as the command line has it, with or without quotes; in a mapping it is a key if a colon follows.
ELEMENT = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|(?:\\.|[^\s,\[\]{}()'"\\%s])(?:\\.|[^,\[\]{}()'"\\%s])*"""

UNPRINTABLE = ("Cc", "Cs", "Zl", "Zp")  # control characters, halves of surrogate pairs, separators of lines


def unprintable(text: str) -> str | None:
    """The first control character, line separator or half of a surrogate pair in `text`; None without one."""
    return next((character for character in text if unicodedata.category(character) in UNPRINTABLE), None)


def typed(setting: str, value: object) -> str:
    """The text to type in a shell to set `setting` to this value, with the quotes of the shell and of Hydra.

    Args:
        setting: The dotted name.
        value: Text, a number, or a list or a mapping of them.
    """
    return for_shell(f"{setting}={_for_hydra(value)}")


def for_shell(word: str) -> str:
    """One word of a command line, quoted if a shell would change it."""
    if shlex.quote(word) == word or "'" not in word:
        return shlex.quote(word)
    escaped = re.sub(r'(["\\$`])', r"\\\1", word)
    return shlex.quote(word) if "!" in word else f'"{escaped}"'  # an interactive shell expands ! in double quotes


def _for_hydra(value: object) -> str:
    if isinstance(value, Mapping):
        pairs = (f"{key}: {_for_hydra(inner)}" for key, inner in value.items())  # Hydra's keys have no quotes
        return f"{{{','.join(pairs)}}}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{','.join(map(_for_hydra, value))}]"
    text = str(value).replace("${", r"\${")
    if not isinstance(value, str) or _is_plain(text):
        return text
    quote = '"' if "'" in text and '"' not in text else "'"
    # A backslash counts before a quote only.
    escaped = re.sub(rf"(\\*){quote}", lambda m: 2 * m[1] + "\\" + quote, text)
    return quote + re.sub(r"(\\+)$", r"\1\1", escaped) + quote


def _is_plain(text: str) -> bool:
    """Whether Hydra reads `text` without quotes as this text, alone and in a list."""
    try:
        alone, inside = OverridesParser.create().parse_overrides([f"x={text}", f"x=[{text}]"])
        return alone.value() == text and inside.value() == [text] and not alone.is_sweep_override()
    except HydraException:
        return False


def readable(argv: Sequence[str]) -> list[str]:
    """The command line as Hydra should read it.

    A name that Hydra would read as a number or a truth value gets quotes: of concept=3.10 it would make 3.1, of
    concept=true True. Names are the values of the settings in NAMES. In any other setting, ~/ at the beginning of a
    value is the home folder, which a shell puts there at the beginning of a word only.
    """
    return [_as_text(word) for word in argv]


def _as_text(word: str) -> str:
    setting, equals, value = word.partition("=")
    if not equals or word.startswith("-"):
        return word
    if setting.lstrip("+") not in NAMES:
        return re.sub(r"(?<=[=\[,])~(?=/)", lambda _: os.path.expanduser("~"), word)
    colon = ":" if value.startswith("{") else ""

    def quoted(m: re.Match) -> str:
        return m[0] if value[m.end() : m.end() + 1] == ":" else _quoted(m[0])

    return f"{setting}={re.sub(ELEMENT % (colon, colon), quoted, value)}"


def _quoted(element: str) -> str:
    try:
        [read] = OverridesParser.create().parse_overrides([f"x={element}"])
    except HydraException:  # of the whole command line, when Hydra reads it
        return element
    return f"'{element.strip()}'" if isinstance(read.value(), int | float) else element

"""The error that a user can fix, and the suggestions that its message makes."""

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(Exception):
    """A mistake that the user can fix; the message says how. The command line prints it without a traceback."""


def nearest(word: str, known: Iterable[str], most: int = 1, cutoff: float = 0.6) -> list[str]:
    """Those of the `known` words that `word` may be a typo of, the nearest first.

    Args:
        word: The word that was given, in upper or lower case.
        most: The number of suggestions at most.
        cutoff: The least similarity of a suggestion, from 0 to 1 (equal).
    """
    by_lower = {name.lower(): name for name in known}
    near = get_close_matches(str(word).lower(), by_lower, n=most, cutoff=cutoff)
    return [by_lower[name] for name in near]


def suggest(names: Iterable[str]) -> str:
    """The end of an error message, with a space before it: " Did you mean a or b?"; "" without names."""
    text = " or ".join(names)
    return f" Did you mean {text}?" if text else ""


def did_you_mean(word: str, known: Iterable[str], most: int = 1, cutoff: float = 0.6) -> str:
    """The end of an error message that suggests the `known` words `nearest` to `word`; "" where none is near."""
    return suggest(nearest(word, known, most, cutoff))


def unknown(kind: str, given: str, known: Iterable[str]) -> UserError:
    """The error for a name that is not among the `known` ones, which suggests the nearest and lists all."""
    known = list(known)
    return UserError(f"Unknown {kind} {given!r}.{did_you_mean(given, known, 3, 0.4)} Known: {', '.join(known)}.")

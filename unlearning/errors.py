"""The error that a user can fix, and the suggestion that it makes."""

from collections.abc import Iterable, Sequence
from difflib import get_close_matches


class UserError(Exception):
    """An error that the user can fix; its message says how. The command line prints it without a traceback."""


def did_you_mean(word: str, known: Iterable[str], exact: Sequence[str] = ()) -> str:
    """A sentence that suggests the nearest of the `known` names, or the `exact` ones if given; "" if none is near."""
    near = list(exact[:3]) or get_close_matches(word.lower(), list(known), n=1)
    return f" Did you mean {' or '.join(f'`{name}`' for name in near)}?" if near else ""

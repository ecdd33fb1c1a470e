"""Concept erasure in image generative models."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unlearning.api import erase
    from unlearning.erasures.base import Erasure

__all__ = ["Erasure", "erase"]
HOMES = {"Erasure": "unlearning.erasures.base", "erase": "unlearning.api"}


def __getattr__(name: str) -> object:
    """Imports what is used: the command line answers --help before anything heavy is imported."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(HOMES[name]), name)

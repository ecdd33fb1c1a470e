"""What the runs of one process share, so that a sweep loads it once: the model, the task, the evaluators."""

import gc
import sys
from collections.abc import Callable, Mapping
from typing import Any

from unlearning.store.files import digest
from unlearning.store.finished import state

_kept: dict[str, tuple[str, Any]] = {}


def shared(name: str, settings: Mapping, build: Callable[[], Any]) -> Any:
    """What `build()` made when last asked for `name`, if the settings and the files they name are still the same.

    Otherwise that is let go of before another is built: memory never holds two models.
    """
    key = digest(settings, state(settings))
    if name not in _kept or _kept[name][0] != key:
        _let_go(name)
        _kept[name] = key, build()
    return _kept[name][1]


def forget() -> None:
    """Lets go of everything: after a failure, which may have left things half changed."""
    _let_go(*_kept)


def _let_go(*names: str) -> None:
    if any([_kept.pop(name, None) for name in names]):
        gc.collect()  # networks are full of cycles
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()

"""Instances that the runs of one process share: a sweep loads its model, its task and its evaluators once."""

import gc
import sys
from collections.abc import Callable, Mapping
from typing import Any

from hydra.utils import instantiate
from omegaconf import DictConfig

from unlearning.config.containers import resolved
from unlearning.store.files import digest
from unlearning.store.finished import state

_instances: dict[str, tuple[str, Any]] = {}


def builder(name: str, node: DictConfig) -> Callable[[], Any]:
    """A function that builds the object of a config's node, or reuses that of an earlier run (`reuse`)."""
    settings = resolved(node)
    return lambda: reuse(name, settings, lambda: instantiate(node))


def trainers(method: Mapping, trainer: Callable) -> dict[str, Any]:
    """The keywords for Hydra's `instantiate` that give `trainer` to a method and to the methods within it.

    Args:
        method: The method's settings; they have `trainer: ???` wherever a trainer is needed, at any depth.
        trainer: Makes a Lightning Trainer.
    """
    inner = {name: trainers(value, trainer) for name, value in method.items() if isinstance(value, Mapping)}
    own = {name: trainer for name, value in method.items() if name == "trainer" and value == "???"}
    return {name: keywords for name, keywords in inner.items() if keywords} | own


def reuse(name: str, settings: Mapping, build: Callable[[], Any]) -> Any:
    """The instance called `name`: the one of an earlier run if its settings, and the files they name, are the same.

    Otherwise the earlier one is released before `build()` makes another, so that memory never holds two models.
    """
    key = digest(settings, state(settings))
    if name not in _instances or _instances[name][0] != key:
        _release(name)
        _instances[name] = key, build()
    return _instances[name][1]


def clear() -> None:
    """Releases all instances. After an error they may be in an invalid state."""
    _release(*_instances)


def _release(*names: str) -> None:
    if any([_instances.pop(name, None) for name in names]):
        gc.collect()  # networks are full of cycles
        if "torch" in sys.modules:
            sys.modules["torch"].cuda.empty_cache()

"""Nodes of a config as dictionaries."""

from typing import Any, cast

from omegaconf import DictConfig, OmegaConf


def resolved(node: DictConfig) -> dict[str, Any]:
    """The settings of a node in nested dictionaries and lists, with all references resolved."""
    return cast(dict[str, Any], OmegaConf.to_container(node, resolve=True))


def as_written(node: DictConfig) -> dict[str, Any]:
    """The settings of a node in nested dictionaries and lists, with references as text: "${concept}"."""
    return cast(dict[str, Any], OmegaConf.to_container(node, resolve=False))

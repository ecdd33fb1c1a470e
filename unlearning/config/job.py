"""The job that Hydra is running in this process."""

import logging
import os
import re

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf


class LogFile(logging.FileHandler):
    """The log file of a run, created with its first line; none in a read-only folder."""

    def __init__(self, filename: str):
        super().__init__(filename, delay=True)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            super().emit(record)
        except OSError:
            self.setStream(open(os.devnull, "w"))  # noqa: SIM115 (closed with the handler)


def is_of_sweep() -> bool:
    """Whether it is one of the jobs of a sweep or a study, which go on after it."""
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def chooses(group: str) -> bool:
    """Whether the command line chooses from a Hydra group."""
    overrides = HydraConfig.get().overrides.task if HydraConfig.initialized() else ()
    return any(re.match(rf"\+?{group}(@[^=]*)?=", override) for override in overrides)


def records(cfg: DictConfig) -> dict[str, str]:
    """Texts by file name: what Hydra would write into .hydra, and the config with all references resolved."""
    if not HydraConfig.initialized():
        return {}
    nodes = {"config": cfg, "hydra": HydraConfig.instance().cfg, "overrides": HydraConfig.get().overrides.task}
    texts = {f".hydra/{name}.yaml": OmegaConf.to_yaml(node) for name, node in nodes.items()}
    return {**texts, ".hydra/resolved.yaml": OmegaConf.to_yaml(cfg, resolve=True)}

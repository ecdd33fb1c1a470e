"""How a run is named: by what was chosen, and by a digest of every setting that its results depend on."""

import re
from collections.abc import Iterable
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from unlearning.store.files import digest

DECISIVE = ("model", "dataset", "method", "sampler", "seed", "trainer")  # evaluators and loggers change no erasure
OUTWARD = (  # of a trainer's settings: what it tells, and where it writes; any other decides what is learned
    "logger",
    "callbacks",
    "default_root_dir",
    "enable_checkpointing",
    "enable_progress_bar",
    "enable_model_summary",
    "log_every_n_steps",
    "profiler",
)


def slug(text: str) -> str:
    """Any text as a file name."""
    return re.sub(r"[^\w.-]+", "-", str(text)).strip("-")[:60] or "unnamed"


def inward(trainer: Iterable[str]) -> list[str]:
    """Those of a trainer's settings that may decide what is learned, by name."""
    return [name for name in trainer if name not in OUTWARD]


def fingerprint(config: DictConfig) -> str:
    decisive = OmegaConf.masked_copy(config, DECISIVE)
    decisive.trainer = OmegaConf.masked_copy(config.trainer, inward(config.trainer))  # callbacks know the run's folder
    decisive._set_parent(config)  # interpolations reach the rest of the config
    return digest(OmegaConf.to_container(decisive, resolve=True))[:8]


def chosen(group: str) -> str | None:
    """The file that a running Hydra chose of a group; None where none was chosen, and where no Hydra is running."""
    return HydraConfig.get().runtime.choices.get(group) if HydraConfig.initialized() else None


def together(concept: str) -> str:
    """What a dashboard groups a run under: its experiment or, of none, the concept and where it is erased."""
    return chosen("experiment") or "/".join(filter(None, (chosen("model"), chosen("dataset"), slug(concept))))


def register_resolvers() -> None:
    """Makes ${package:folder}, ${slug:text}, ${fingerprint:}, ${chosen:group} and ${together:concept} known."""
    OmegaConf.register_new_resolver("package", lambda name: str(Path(__file__).parents[1] / name), replace=True)
    OmegaConf.register_new_resolver("slug", slug, replace=True)
    OmegaConf.register_new_resolver("chosen", chosen, replace=True)
    OmegaConf.register_new_resolver("together", together, replace=True)
    OmegaConf.register_new_resolver("fingerprint", lambda *, _root_: fingerprint(_root_), replace=True)

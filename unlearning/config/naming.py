"""The names of runs: the choices that made a run, and a hash of every setting that its images depend on."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from unlearning.config.containers import as_written, resolved
from unlearning.config.decisive import Result, decisive
from unlearning.config.precision import settle
from unlearning.store.files import digest


def joined(texts: str | Sequence[str]) -> str:
    """One or several texts in one: "cat+dog"."""
    return "+".join(map(str, texts)) if isinstance(texts, Sequence) and not isinstance(texts, str) else str(texts)


def slug(texts: str | Sequence[str]) -> str:
    """One or several texts as a file name of at most 60 characters: "Van-Gogh", "cat+dog"."""
    name = re.sub(r"[^\w.+-]+", "-", joined(texts)).strip("-")[:60]
    return name if name.strip(".") else "unnamed"  # . and .. are other folders


def folder_name(path: str | None) -> str:
    """The own name of a folder at a path: "mugs" for "pictures/of/mugs/" and for ".." below it; "" without a path."""
    return Path(os.path.abspath(Path(path).expanduser())).name if path else ""  # of a link, the link's


def config_hash(config: DictConfig, result: Result = "images") -> str:
    """Eight hexadecimal digits that stand for the settings that a result depends on, by default a run's images.

    Two configs that differ in `model.gradient_checkpointing` alone have one hash.
    """
    kept = OmegaConf.create(decisive(as_written(config), result))
    kept._set_parent(config)  # interpolations refer to the rest of the config
    settle(kept, OmegaConf.select(config, "model.device"))  # which decides nothing else
    return digest(decisive(resolved(kept), result))[:8]


def chosen(group: str) -> str | None:
    """The name of the file that was chosen from a Hydra group; None without a choice or outside a Hydra run."""
    return HydraConfig.get().runtime.choices.get(group) if HydraConfig.initialized() else None


def dashboard_group(concept: str | Sequence[str]) -> str:
    """The group of a run in a dashboard: its experiment if it has one, otherwise "model/dataset/concept"."""
    return chosen("experiment") or "/".join(filter(None, (chosen("model"), chosen("dataset"), slug(concept))))


def register_resolvers() -> None:
    """Registers the resolvers that conf/ uses: ${package:folder}, ${slug:texts}, ${config_hash:}, and so on."""
    OmegaConf.register_new_resolver("package", lambda name: str(Path(__file__).parents[1] / name), replace=True)
    OmegaConf.register_new_resolver("slug", slug, replace=True)
    OmegaConf.register_new_resolver("folder_name", folder_name, replace=True)
    OmegaConf.register_new_resolver("joined", joined, replace=True)
    OmegaConf.register_new_resolver("chosen", chosen, replace=True)
    OmegaConf.register_new_resolver("dashboard_group", dashboard_group, replace=True)
    OmegaConf.register_new_resolver("config_hash", lambda *, _root_: config_hash(_root_), replace=True)

"""Composes the real configuration for a test, as the command line does, with outputs in the test's folder."""

import pickle
from functools import cache
from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from unlearning.__main__ import CONF

MOST = 3  # any whole number of a method or an attack, so that it is short
# With random weights no word describes an image, and no feature tells concepts apart; a warm-up would be all there is.
RANDOM = {"purity": 0.0, "conditioning": "caption", "warmup_steps": 0, "words": ["cat", "dog", "sky"]}
# Without suites, which are no attack of their own, and without variants.
ATTACKS = [path.stem for path in sorted((CONF / "attack").glob("*.yaml")) if "@package" in path.read_text()]


def config(output: Path, *overrides: str) -> DictConfig:
    """The main config with `overrides`, without loggers, with all files below `output`."""
    composed = pickle.loads(_composed(overrides))
    composed.paths.output_dir, composed.paths.store = str(output / "run"), str(output / "store")
    return composed


@cache
def _composed(overrides: tuple[str, ...]) -> bytes:
    """A pickled config: quicker to copy, and nothing that a garbage collection has to look at."""
    quiet = [
        "title=a test",
        "logger=none",
        "trainer.enable_progress_bar=false",
        "trainer.callbacks=[]",
        "+trainer.enable_checkpointing=false",
        "+trainer.logger=false",
        "trainer.accelerator=cpu",
        "model.device=cpu",
        "model.autocast=null",  # the same numbers on every processor
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return pickle.dumps(compose("config", overrides=[*quiet, *overrides]))


def shortened(node: DictConfig, most: int = MOST) -> None:
    """Lowers every whole number to `most`, and sets what RANDOM names, at any depth."""
    for name in list(node):
        if OmegaConf.is_missing(node, name) or OmegaConf.is_interpolation(node, name):
            continue
        if OmegaConf.is_dict(node[name]):
            shortened(node[name], most)
        elif name in RANDOM:
            node[name] = RANDOM[name]
        elif type(node[name]) is int:
            node[name] = min(node[name], most)

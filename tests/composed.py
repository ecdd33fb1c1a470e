"""The real configuration, composed for a test: what the command line would build, in a folder of the test's own."""

from pathlib import Path

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from unlearning.__main__ import CONF


def config(output: Path, *overrides: str) -> DictConfig:
    """The main config with `overrides`; nothing is logged, everything is written below `output`."""
    quiet = [
        f"paths.output_dir={output / 'run'}",
        f"paths.store={output / 'store'}",
        "title=a test",
        "logger=none",
        "trainer.enable_progress_bar=false",
        "trainer.callbacks=[]",
        "+trainer.enable_checkpointing=false",
        "+trainer.logger=false",
        "trainer.accelerator=cpu",
        "model.device=cpu",
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=[*quiet, *overrides])

"""Loggers for a run's metrics and images. A logger that fails gives a warning and never stops the run."""

import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger

from unlearning.errors import UserError
from unlearning.store.images import opened
from unlearning.store.manifest import ManifestRow

messages = logging.getLogger(__name__)
MAX_PAIRS, MAX_ENTRIES = 32, 16  # image pairs that are logged; entries of a list in the config


class Forgiving(Logger):
    """Wraps a logger so that its failures are warnings. A method that has failed is not called again.

    Args:
        label: The logger's name in the config, for the warnings.
        logger: The wrapped logger.
    """

    def __init__(self, label: str, logger: Logger) -> None:
        super().__init__()
        self.label = label
        self.logger = logger
        self.failed: set[str] = set()

    def attempt(self, verb: str, *args: Any) -> None:
        """Calls a method of the logger, if it exists: some loggers cannot show images."""
        if verb in self.failed or not hasattr(self.logger, verb):
            return
        try:
            getattr(self.logger, verb)(*args)
        except Exception as error:
            self.failed.add(verb)
            warn(self.label, f"cannot {verb.replace('_', ' ')}", error)

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.attempt("log_metrics", metrics, step)

    def log_hyperparams(self, params: Any, *args: Any) -> None:
        self.attempt("log_hyperparams", params, *args)

    def log_image(self, key: str, images: list[Any]) -> None:
        """Logs images, if the logger can show them."""
        self.attempt("log_image", key, images)

    def log_table(self, key: str, columns: list[str], data: list[list[Any]]) -> None:
        """Logs a table, if the logger can show one."""
        self.attempt("log_table", key, columns, data)

    def log_summary(self, values: dict[str, float | str]) -> None:
        """Logs the run's summary, if the logger has one."""
        self.attempt("log_summary", values)

    def after_save_checkpoint(self, checkpoint_callback: Any) -> None:
        self.attempt("after_save_checkpoint", checkpoint_callback)

    def save(self) -> None:
        self.attempt("save")

    def finalize(self, status: str) -> None:
        self.attempt("finalize", status)

    @property
    def name(self) -> str | None:
        return self.logger.name

    @property
    def version(self) -> str | int | None:
        return self.logger.version

    @property
    def save_dir(self) -> str | None:
        return self.logger.save_dir

    @property
    def log_dir(self) -> str | None:
        return self.logger.log_dir


class WandbRun(WandbLogger):
    """Lightning's W&B logger, adapted to sweeps and their dashboard."""

    @property
    def experiment(self) -> Any:
        """The W&B run, which starts at the first use. If the server cannot be reached, it starts offline.

        wandb waits long for the server, so later runs of this process start offline at once.
        """
        try:
            return super().experiment
        except Exception as error:
            if self._wandb_init["mode"] != "online":
                raise
            warn("wandb", "goes on offline", error)
            os.environ["WANDB_MODE"] = self._wandb_init["mode"] = "offline"
            return super().experiment

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Logs settings by dotted names, like the settings of a sweep's agent; nested ones would not match those."""
        super().log_hyperparams(flat(params))

    def log_summary(self, values: Mapping[str, float | str]) -> None:
        """Logs the run's summary: the keys of metrics.json, with protocols."""
        self.experiment.summary.update(dict(values))

    def log_table(self, key: str, columns: list[str], data: list[list[Any]]) -> None:
        """Logs a table whose cells may be images."""
        from wandb import Image as WandbImage

        shown = [[WandbImage(cell) if isinstance(cell, Image.Image) else cell for cell in row] for row in data]
        super().log_table(key, columns, shown)

    def finish(self) -> None:
        """Ends the run: a sweep has many runs in one process."""
        if self._experiment is not None:
            self._experiment.finish()


def wandb(save_dir: str | Path, project: str = "unlearning", **options: Any) -> WandbRun:
    """A logger for Weights & Biases: online if there is an API key, else offline; WANDB_MODE overrides this.

    It writes only below `save_dir`, and nothing to the console. The W&B run starts at the first use.

    Args:
        save_dir: A folder for this run alone.
        project: The project on the server.
        options: More arguments of `wandb.init`: name, group, job_type, tags, config, ...
    """
    folder = Path(save_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_SILENT", "true")
    for place in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):  # wandb reads these once in a process
        os.environ.setdefault(place, str(folder / "wandb"))
    import wandb as client

    mode = os.environ.get("WANDB_MODE") or ("online" if client.login(prompt=False, verify=False) else "offline")
    settings = {"silent": True, "console": "off", **options.pop("settings", {})}
    return WandbRun(save_dir=folder, project=project, mode=mode, reinit="create_new", settings=settings, **options)


class TensorBoard(TensorBoardLogger):
    """Lightning's TensorBoard logger, which also shows images.

    Raises:
        UserError: If TensorBoard is not installed.
    """

    def __init__(self, save_dir: str | Path):
        try:
            super().__init__(save_dir, name="tensorboard", version="")
        except ModuleNotFoundError:
            raise UserError("TensorBoard is not installed: pip install 'concept-unlearning[tensorboard]'") from None

    def log_image(self, key: str, images: list[np.ndarray | Image.Image]) -> None:
        """Logs images."""
        for i, image in enumerate(images):
            pixels = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image)
            self.experiment.add_image(f"{key}/{i}", pixels, dataformats="HWC")


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"method": {"eta": 1.0}, "templates": ["{}", "a {}"]} -> {"method.eta": 1.0, "templates": "{}+a {}"}.

    A long list becomes its number of entries.
    """
    flattened: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flattened |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            flattened[f"{prefix}{key}"] = (
                "+".join(map(str, value)) if len(value) <= MAX_ENTRIES else f"{len(value)} entries"
            )
        else:
            flattened[f"{prefix}{key}"] = value
    return flattened


def build(configs: Mapping[str, Any] | None) -> list[Forgiving]:
    """The loggers of a config. A logger that cannot be built gives a warning and is left out."""
    from hydra.utils import instantiate

    loggers = []
    for label, config in (configs or {}).items():
        try:
            loggers.append(Forgiving(label, instantiate(config, _convert_="all")))
        except Exception as error:
            warn(label, "is left out", error)
    return loggers


def log(
    loggers: Sequence[Forgiving],
    metrics: Mapping[str, float | str],
    images: Mapping[str, Sequence[np.ndarray | Image.Image]] | None = None,
    config: Mapping[str, Any] | None = None,
    pairs: Sequence[tuple[ManifestRow, ManifestRow]] = (),
    attacked: Mapping[str, Sequence[ManifestRow]] | None = None,
) -> None:
    """Logs the results of a run: its config, its metrics with their protocols, and its images.

    Args:
        metrics: The content of metrics.json. It is logged as metrics, as a table and as the run's summary.
        images: Images (H, W, 3) uint8 by caption.
        config: The settings.
        pairs: Manifest rows before and after the erasure. The first pair of each prompt is shown side by side.
        attacked: Manifest rows of each attack, by its name. Its images are shown, and all rates of success in a table.

    Raises:
        TypeError: If an image is not uint8. W&B would log it as a black image, without an error.
    """
    for key, pictures in (images or {}).items():
        for picture in pictures:
            if not isinstance(picture, Image.Image) and getattr(picture, "dtype", None) != np.uint8:
                kind = getattr(picture, "dtype", type(picture).__name__)
                raise TypeError(f"The images of {key!r} must be uint8 arrays or PIL images, but one is {kind}.")
    numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
    sides = _sides(pairs)
    if sides:
        images = {"base": [row[-2] for row in sides], "erased": [row[-1] for row in sides], **(images or {})}
    images = dict(images or {}) | {f"attacked/{name}": _opened(rows) for name, rows in (attacked or {}).items()}
    rates = _rates(numbers, list(attacked or {}))
    for logger in loggers:
        if config:
            logger.log_hyperparams(dict(config))
        logger.log_metrics(numbers)
        logger.log_summary(dict(metrics))
        logger.log_table("metrics", ["metric", "value"], [list(row) for row in numbers.items()])
        if sides:
            logger.log_table("pictures", ["prompt", "role", "seed", "base", "erased"], sides)
        if rates:
            logger.log_table("attacks", ["attack", "metric", "value"], rates)
        for key, pictures in images.items():
            if len(pictures):
                logger.log_image(key, list(pictures))
        logger.save()


def _opened(rows: Sequence[ManifestRow]) -> list[Image.Image]:
    """The images of the first rows, as far as they exist."""
    images = []
    for row in rows[:MAX_PAIRS]:
        with suppress(UserError), opened(row.path) as image:
            images.append(image.convert("RGB"))
    return images


def _rates(numbers: Mapping[str, float], attacks: Sequence[str]) -> list[list[Any]]:
    """[attack, metric, value] of each number about an attack: asr, asr_before, asr_new, ..."""
    rates = []
    for key, value in numbers.items():
        purpose, _, name = key.partition("/")
        own = [attack for attack in attacks if name.endswith(f"_{attack}")]
        if purpose == "robustness" and own:
            attack = max(own, key=len)  # noisy_classifier_guidance, and not classifier_guidance
            rates.append([attack, name.removesuffix(f"_{attack}"), value])
    return rates


def _sides(pairs: Sequence[tuple[ManifestRow, ManifestRow]]) -> list[list[Any]]:
    """[prompt, role, seed, before, after] for the first pair of each prompt whose images exist."""
    first = {after.prompt: (before, after) for before, after in reversed(pairs)}
    sides = []
    for before, after in list(reversed(first.values()))[:MAX_PAIRS]:
        with suppress(UserError), opened(before.path) as one, opened(after.path) as other:
            sides.append([after.prompt, after.role, after.seed, one.convert("RGB"), other.convert("RGB")])
    return sides


def close(loggers: Sequence[Forgiving]) -> None:
    """Ends the loggers' runs, so that the next run of a sweep gets new ones."""
    for logger in loggers:
        logger.finalize("success")
        logger.attempt("finish")


def warn(label: str, what: str, error: Exception) -> None:
    """A warning that a logger failed, with the error in one line."""
    messages.warning("Logger %s %s: %s", label, what, " ".join(str(error).split()) or type(error).__name__)

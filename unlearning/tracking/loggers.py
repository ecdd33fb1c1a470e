"""Where a run's numbers and pictures are written down. A logger that fails costs a warning, never the run."""

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
from unlearning.store.images import Row

messages = logging.getLogger(__name__)
PAIRS, LISTED = 32, 16  # at most: pictures before and after, and entries of a setting that is a list


class Forgiving(Logger):
    """Another logger, whose failures are warnings. What has failed once is not tried again."""

    def __init__(self, label: str, logger: Logger) -> None:
        super().__init__()
        self.label = label
        self.logger = logger
        self.failed: set[str] = set()

    def attempt(self, verb: str, *args: Any) -> None:
        """Calls a method of the logger, if it has one of that name: not all can show pictures."""
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
        self.attempt("log_image", key, images)

    def log_table(self, key: str, columns: list[str], data: list[list[Any]]) -> None:
        self.attempt("log_table", key, columns, data)

    def log_summary(self, values: dict[str, float | str]) -> None:
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
    """Lightning's logger, with what a sweep and its dashboard need of it."""

    @property
    def experiment(self) -> Any:
        """The run, begun when first asked for; offline where the server cannot be reached, which wandb waits for long.

        The process's later runs then begin offline.
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
        """By dotted name, as a sweep calls them: its agent has set some already, which nested ones would not meet."""
        super().log_hyperparams(flat(params))

    def log_summary(self, values: Mapping[str, float | str]) -> None:
        """What the run is listed by: the names of metrics.json, protocols too."""
        self.experiment.summary.update(dict(values))

    def log_table(self, key: str, columns: list[str], data: list[list[Any]]) -> None:
        """A table whose cells may be pictures."""
        from wandb import Image as Picture

        shown = [[Picture(cell) if isinstance(cell, Image.Image) else cell for cell in row] for row in data]
        super().log_table(key, columns, shown)

    def finish(self) -> None:
        """Ends the run before the process ends: a sweep has many runs in one process."""
        if self._experiment is not None:
            self._experiment.finish()


def wandb(save_dir: str | Path, project: str = "unlearning", **options: Any) -> WandbRun:
    """A Weights & Biases run: online with an API key, otherwise offline; WANDB_MODE overrules.

    Everything is written under `save_dir`, and nothing to the console. The run begins with the first thing logged.

    Args:
        save_dir: A folder of this run alone.
        project: The project on the server.
        options: More of `wandb.init`: name, group, job_type, tags, config, ...
    """
    folder = Path(save_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("WANDB_SILENT", "true")
    for place in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):  # of which wandb reads some once a process
        os.environ.setdefault(place, str(folder / "wandb"))
    import wandb as client

    mode = os.environ.get("WANDB_MODE") or ("online" if client.login(prompt=False, verify=False) else "offline")
    settings = {"silent": True, "console": "off", **options.pop("settings", {})}
    return WandbRun(save_dir=folder, project=project, mode=mode, reinit="create_new", settings=settings, **options)


class TensorBoard(TensorBoardLogger):
    """Lightning's logger, which shows pictures too. Raises UserError where TensorBoard is not installed."""

    def __init__(self, save_dir: str | Path):
        try:
            super().__init__(save_dir, name="tensorboard", version="")
        except ModuleNotFoundError:
            raise UserError("TensorBoard is not installed: pip install 'unlearning[tensorboard]'") from None

    def log_image(self, key: str, images: list[np.ndarray | Image.Image]) -> None:
        for i, picture in enumerate(images):
            pixels = np.asarray(picture.convert("RGB") if isinstance(picture, Image.Image) else picture)
            self.experiment.add_image(f"{key}/{i}", pixels, dataformats="HWC")


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"method": {"eta": 1.0}, "templates": ["{}", "a {}"]} -> {"method.eta": 1.0, "templates": "{}+a {}"}.

    Of a list with many entries, how many.
    """
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, list | tuple):
            found[f"{prefix}{key}"] = "+".join(map(str, value)) if len(value) <= LISTED else f"{len(value)} entries"
        else:
            found[f"{prefix}{key}"] = value
    return found


def build(configs: Mapping[str, Any] | None) -> list[Forgiving]:
    """The loggers of a configuration; one that cannot be built is left out."""
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
    pairs: Sequence[tuple[Row, Row]] = (),
) -> None:
    """What a run came to: its configuration, its metrics with their protocols, its pictures.

    Args:
        metrics: What metrics.json holds: shown one by one, as a table, and as the run's summary.
        images: Figures (H, W, 3) uint8 by caption.
        pairs: Manifest rows before and after, of which the first of each prompt are shown side by side.

    Raises:
        TypeError: A picture of floats. W&B would keep it, silently, as a black one.
    """
    for key, pictures in (images or {}).items():
        for picture in pictures:
            if not isinstance(picture, Image.Image) and getattr(picture, "dtype", None) != np.uint8:
                kind = getattr(picture, "dtype", type(picture).__name__)
                raise TypeError(f"The pictures under {key!r} have to be uint8 arrays or PIL images, and one is {kind}.")
    numbers = {key: value for key, value in metrics.items() if isinstance(value, int | float)}
    sides = _sides(pairs)
    if sides:
        images = {"base": [row[-2] for row in sides], "erased": [row[-1] for row in sides], **(images or {})}
    for logger in loggers:
        if config:
            logger.log_hyperparams(dict(config))
        logger.log_metrics(numbers)
        logger.log_summary(dict(metrics))
        logger.log_table("metrics", ["metric", "value"], [list(row) for row in numbers.items()])
        if sides:
            logger.log_table("pictures", ["prompt", "role", "seed", "base", "erased"], sides)
        for key, pictures in (images or {}).items():
            if len(pictures):
                logger.log_image(key, list(pictures))
        logger.save()


def _sides(pairs: Sequence[tuple[Row, Row]]) -> list[list[Any]]:
    """[prompt, role, seed, before, after] of the first pair of each prompt whose pictures are there."""
    first = {after.prompt: (before, after) for before, after in reversed(pairs)}
    sides = []
    for before, after in list(reversed(first.values()))[:PAIRS]:
        with suppress(OSError):
            pictures = [Image.open(row.path).convert("RGB") for row in (before, after)]
            sides.append([after.prompt, after.role, after.seed, *pictures])
    return sides


def close(loggers: Sequence[Forgiving]) -> None:
    """Ends the loggers' runs, so that the next run of a sweep has its own."""
    for logger in loggers:
        logger.finalize("success")
        logger.attempt("finish")


def warn(label: str, what: str, error: Exception) -> None:
    messages.warning("Logger %s %s: %s", label, what, " ".join(str(error).split()) or type(error).__name__)

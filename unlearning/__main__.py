"""The command line: unlearn concept=cat method=esd_x model=emoji_unet

Nothing heavy is imported before the settings are checked, so that --help and typos are answered at once.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_store import ConfigStore
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig

from unlearning.config import instances, job, messages, precision, studies, sweeps, validation
from unlearning.config.containers import as_written, resolved
from unlearning.config.decisive import decisive
from unlearning.config.naming import register_resolvers
from unlearning.config.quoting import readable
from unlearning.errors import UserError
from unlearning.store import finished
from unlearning.store.files import read_state

PACKAGE = Path(__file__).parent
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"  # of a wheel, of a checkout
PLAIN_FORMAT = warnings.formatwarning
log = logging.getLogger(__name__)
register_resolvers()


def run(cfg: DictConfig) -> dict[str, float | str]:
    """Executes the run that `cfg` describes, unless it is finished. Returns what metrics.json holds."""
    validation.check_text(as_written(cfg))
    precision.settle(cfg := cfg.copy(), cfg.model.device)
    settings = resolved(cfg)
    folder = Path(cfg.paths.output_dir)
    key = finished.key(decisive(settings, "folder"), files=decisive(settings, "numbers"))
    done = partial(finished.finished, folder, key, cfg.stages)
    if done():
        log.info("%s: nothing is left to do", cfg.title)
        return read_state(folder / "metrics.json", dict) or {}
    try:
        metrics = _execute(cfg, settings, done)
    except BaseException:
        instances.clear()
        raise
    from unlearning.store.ranks import first_rank

    if first_rank() and not messages.RETRIED & metrics.keys():
        finished.finish(folder, key, cfg.stages)
    return metrics


def _execute(cfg: DictConfig, settings: dict, done: Callable[[], bool]) -> dict[str, float | str]:
    """Builds what the config names and executes its stages. This is the only place where settings become objects."""
    validation.check_names(cfg, CONF)
    validation.check_top(settings)
    validation.check(settings["dataset"], "dataset")
    task = instances.builder("dataset", cfg.dataset)()  # before any heavy import: its names are mistyped most
    _quieten()  # before the libraries are imported to read the signatures of classes
    validation.check(settings)

    from unlearning.run import Run
    from unlearning.stages.measurement import metrics_of
    from unlearning.tracking import loggers
    from unlearning.training import trainers

    quieten_lightning()
    _check_family(cfg)
    evaluators = {name: instances.builder(f"evaluator {name}", node)() for name, node in cfg.evaluator.items()}
    studies.check_objective(settings["objective"], metrics_of(evaluators.values(), cfg.attack))
    logger = loggers.build(cfg.get("logger"))
    trainer = trainers.prepared(instantiate(cfg.trainer, logger=logger))
    _check_trainer(trainer, cfg)
    folder, runs = Path(cfg.paths.output_dir), Path(cfg.paths.runs).absolute()
    work = Run(
        folder=folder,
        store=Path(cfg.paths.store),
        load_model=instances.builder("model", cfg.model),
        task=task,
        method=instantiate(cfg.method, **instances.trainers(settings["method"], trainer)),
        after=[Path(path) for path in _as_list(settings["after"])],
        attacks={name: instantiate(node) for name, node in cfg.attack.items()},
        sampler=instantiate(cfg.sampler),
        evaluators=evaluators,
        trainer=trainer,
        seed=cfg.seed,
        logger=logger,
        title=cfg.title,
        runs=runs if runs in folder.parents else folder,
        settings=settings,
        records=job.records(cfg),
        done=done if job.is_of_sweep() else None,
        all_must_measure=job.chooses("evaluator"),
    )
    try:
        return work.execute(cfg.stages)
    finally:
        loggers.close(logger)


def _check_family(cfg: DictConfig) -> None:
    """Raises UserError for a method or an attack that does not work on models of this class; none is loaded yet."""
    load: Any = get_object(cfg.model._target_)
    for node in (cfg.method, *cfg.attack.values()):
        kind: Any = get_object(node._target_)
        if not issubclass(load.__self__, kind.works_on):
            raise UserError(f"{kind.__name__} works on a {kind.works_on.__name__}, not on a {load.__self__.__name__}.")


def _check_trainer(trainer: Callable, cfg: DictConfig) -> None:
    """Raises UserError for a Trainer that cannot be built: most often for an accelerator that is not there."""
    from pytorch_lightning.utilities.exceptions import MisconfigurationException

    from unlearning.training.trainers import number_process

    try:
        number_process(trainer(logger=False))
    except (MisconfigurationException, RuntimeError, TypeError, ValueError) as error:
        chosen = ", ".join(f"trainer.{name}={cfg.trainer.get(name)}" for name in ("accelerator", "devices", "strategy"))
        raise UserError(f"{chosen}: {' '.join(str(error).split())}") from error


def _as_list(value: Any) -> list:
    return value if isinstance(value, list) else [] if value is None else [value]


def _quieten() -> None:
    """Leaves the terminal to this package: libraries print errors only, and no bars while they load weights.

    What they would warn of in a model's files, this package refuses by name (models/folders.py).
    """
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    for library in (of_diffusers, of_transformers):
        library.disable_progress_bar()
        library.set_verbosity_error()


def quieten_lightning() -> None:
    """Silences Lightning's messages about itself at every stage."""
    for name in ("pytorch_lightning", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)  # importing them sets INFO
    warnings.filterwarnings("ignore", ".*LeafSpec")  # from Lightning's use of PyTorch, at every stage


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def compose_and_run(cfg: DictConfig) -> float | list[float] | None:
    """Runs the composed config, prints the numbers, and returns the objective of a study. An error ends the program."""
    try:
        return _run_and_print(cfg)
    except Exception as error:
        if job.is_of_sweep():
            raise
        sys.exit(messages.error_message(error, CONF, sys.argv[1:]))  # Hydra would print all overrides before it


def _run_and_print(cfg: DictConfig) -> float | list[float] | None:
    from rich.console import Console
    from rich.markup import escape

    from unlearning.reporting.formats import summary

    metrics = run(cfg)
    if int(os.environ.get("LOCAL_RANK", 0)):
        return None  # the first process of a distributed run prints
    console = Console()
    if metrics:
        console.print(summary(metrics), markup=False)
    if (page := Path(cfg.paths.output_dir) / "report.html").exists():
        console.print(f"[bold]{escape(str(page))}[/bold] shows the images.", soft_wrap=True)
    for message in messages.incomplete(metrics):
        if not job.is_of_sweep():
            raise UserError(message)
        log.warning("%s: %s", cfg.title, message)
    return studies.objective(cfg.objective, metrics)


def _formatted(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning as Python prints it, but one of this package without the line of code that it comes from."""
    if Path(filename).is_relative_to(PACKAGE):
        return f"{message}\n"
    return PLAIN_FORMAT(message, category, filename, lineno, line)


def main() -> None:
    """The console command. A mistake of the user's ends in one message and exit code 1, not in a traceback."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing
    warnings.formatwarning = _formatted
    studies.register()
    ConfigStore.__deepcopy__ = lambda store, memo: store  # type: ignore[attr-defined]  # --help copied it 200 times
    sys.argv[1:] = readable(sys.argv[1:])
    try:
        compose_and_run()
    except (KeyboardInterrupt, SystemExit) as stop:
        if messages.is_interruption(stop):
            sys.exit(messages.INTERRUPTED)
        raise
    except sweeps.JobFailed as error:
        sys.exit(sweeps.failures() or str(error))
    except Exception as error:
        if failed := sweeps.failures():
            print(failed, file=sys.stderr)
        sys.exit(messages.error_message(error, CONF, sys.argv[1:]))
    if failed := sweeps.failures():
        sys.exit(failed)


if __name__ == "__main__":
    main()

"""The command line: unlearn concept=cat method=esd_x model=emoji_unet

Nothing heavy is imported before the settings are known to be right, so that --help and a typo are answered at once.
"""

import json
import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from unlearning.config import instances as sharing
from unlearning.config import studies, sweeps
from unlearning.config import validation as checking
from unlearning.config.decisive import decisive
from unlearning.config.naming import register_resolvers
from unlearning.errors import UserError
from unlearning.store import finished

CONF = Path(__file__).parents[1] / "conf"
LEFT_OUT = {  # by the number in metrics.json that counts it
    "cost/skipped": "pictures or rows that were skipped: {}. Warnings above name them.",
    "cost/failed": "pictures that could not be made: {}. Warnings above say why.",
    "cost/unmeasured": "measurements that failed: {}. Warnings above say why; the same command tries again.",
}
AGAIN = {"cost/failed", "cost/unmeasured"}  # of those, what the same command may yet do
KILLED = ("TerminatedWorkerError", "UncompletedJobError")  # what joblib and submitit make of it
log = logging.getLogger(__name__)
register_resolvers()


def run(cfg: DictConfig) -> dict[str, float | str]:
    """What metrics.json holds when the run that the config describes is over; if it has been before, that at once."""
    settings = OmegaConf.to_container(cfg, resolve=True)
    folder = Path(cfg.paths.output_dir)
    key = finished.key(decisive(settings, "folder"), files=decisive(settings, "numbers"))
    done = partial(finished.finished, folder, key, cfg.stages)
    if done():
        log.info("%s: nothing is left to do", cfg.title)
        metrics = folder / "metrics.json"
        return json.loads(metrics.read_text()) if metrics.exists() else {}
    try:
        metrics = _execute(cfg, settings, done)
    except BaseException:
        sharing.forget()
        raise
    from unlearning.run import first_rank

    if first_rank() and not AGAIN & metrics.keys():
        finished.finish(folder, key, cfg.stages)
    return metrics


def _execute(cfg: DictConfig, settings: dict, done: Callable[[], bool]) -> dict[str, float | str]:
    """Builds what the config names and executes its stages; the one place where settings become objects."""
    from hydra.utils import get_class, get_method, instantiate

    def shared(name: str, node: DictConfig) -> Callable[[], Any]:
        told = OmegaConf.to_container(node, resolve=True)
        return lambda: sharing.shared(name, told, lambda: instantiate(node))

    checking.check_names(cfg, CONF)
    checking.check(settings["dataset"], "dataset")
    task = shared("dataset", cfg.dataset)()  # before anything slow is imported: its names are what is mistyped most
    checking.check(settings)

    from unlearning.run import Run, metrics_of
    from unlearning.tracking import loggers

    for name in ("pytorch_lightning", "lightning_fabric"):  # whose import has set their levels to INFO
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*LeafSpec")  # Lightning's affair with PyTorch, told at every stage
    method, model = get_class(cfg.method._target_), get_method(cfg.model._target_).__self__
    if not issubclass(model, method.works_on):
        raise UserError(f"{method.__name__} works on a {method.works_on.__name__}; a {model.__name__} is none.")
    evaluators = {name: shared(f"evaluator {name}", node)() for name, node in cfg.get("evaluator", {}).items()}
    studies.check_objective(settings["objective"], metrics_of(evaluators.values()))
    logger = loggers.build(cfg.get("logger"))
    trainer = instantiate(cfg.trainer, logger=logger)
    needs = {"trainer": trainer} if OmegaConf.is_missing(cfg.method, "trainer") else {}
    folder, runs = Path(cfg.paths.output_dir), Path(cfg.paths.runs).absolute()
    work = Run(
        folder=folder,
        store=Path(cfg.paths.store),
        load_model=shared("model", cfg.model),
        task=task,
        method=instantiate(cfg.method, **needs),
        sampler=instantiate(cfg.sampler),
        evaluators=evaluators,
        trainer=trainer,
        seed=cfg.seed,
        logger=logger,
        title=cfg.title,
        runs=runs if runs in folder.parents else folder,
        settings=settings,
        records=_records(cfg),
        done=done if _one_of_many() else None,
    )
    try:
        return work.execute(cfg.stages)
    finally:
        loggers.close(logger)


def _one_of_many() -> bool:
    """Whether this is a job of a sweep or a study, which others go on after."""
    return HydraConfig.initialized() and HydraConfig.get().mode is RunMode.MULTIRUN


def _records(cfg: DictConfig) -> dict[str, str]:
    """What Hydra would write into .hydra at once, and the config with all that it refers to."""
    if not HydraConfig.initialized():
        return {}
    told = {"config": cfg, "hydra": HydraConfig.instance().cfg, "overrides": HydraConfig.get().overrides.task}
    records = {f".hydra/{name}.yaml": OmegaConf.to_yaml(node) for name, node in told.items()}
    return {**records, ".hydra/resolved.yaml": OmegaConf.to_yaml(cfg, resolve=True)}


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def compose_and_run(cfg: DictConfig) -> float | list[float] | None:
    from rich.console import Console

    from unlearning.reporting.summary import summary

    metrics = run(cfg)
    if int(os.environ.get("LOCAL_RANK", 0)):
        return None  # the first process of a distributed run tells
    console = Console()
    console.print(summary(metrics))
    console.print(f"[bold]{Path(cfg.paths.output_dir) / 'report.html'}[/bold] shows the pictures.", soft_wrap=True)
    for name, what in LEFT_OUT.items():
        if name in metrics:
            said = f"Everything is done but for {what.format(metrics[name])}"
            if not _one_of_many():
                raise UserError(said)
            log.warning("%s: %s", cfg.title, said)
    return studies.objective(cfg.objective, metrics)


def main() -> None:
    """The console command. A mistake of the user's ends in one message and exit code 1, not in a traceback."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing, so that the message can be ours
    studies.register()
    try:
        compose_and_run()
    except (KeyboardInterrupt, SystemExit) as stop:
        asked = isinstance(stop.__context__, KeyboardInterrupt) or type(stop).__name__ == "SIGTERMException"
        if isinstance(stop, KeyboardInterrupt) or asked:  # what Lightning makes of Ctrl-C and of a termination
            sys.exit("Interrupted. The same command goes on from here.")
        raise
    except sweeps.JobFailed as error:
        sys.exit(sweeps.failures() or str(error))
    except Exception as error:
        if failed := sweeps.failures():
            print(failed, file=sys.stderr)
        sys.exit(_message(error))
    if failed := sweeps.failures():
        sys.exit(failed)


def _message(error: BaseException) -> str:
    """What to tell the user. Raises the error again if it is a fault of the program's."""
    if type(error).__name__ in KILLED:
        return (
            "\nA process that ran jobs was killed, most often by the system because memory ran out: fewer at once "
            "(hydra.launcher.n_jobs=1) need less. The same command goes on from here."
        )
    if not isinstance(error, HydraException | OmegaConfBaseException | UserError | OSError | YAMLError):
        raise error
    from unlearning.config.suggestions import explain

    cause = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__
    if cause is not None:
        return f"\n{cause}"
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        return f"\n{error}\nWhat was finished is kept; the same command goes on from here."
    if type(error).__name__ == "InstantiationException":
        raise error
    return explain(error, CONF, sys.argv[1:])


if __name__ == "__main__":
    main()

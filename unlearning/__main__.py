"""The command line: unlearn concept=cat method=esd_x model=emoji_unet

Nothing heavy is imported before the settings are known to be right, so that --help and a typo are answered at once.
"""

import os
import sys
from pathlib import Path

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from unlearning.concepts import UserError
from unlearning.naming import register_resolvers

CONF = Path(__file__).parents[1] / "conf"
register_resolvers()


def run(cfg: DictConfig) -> dict[str, float | str]:
    """Builds what the config names and executes its stages; the one place where settings become objects."""
    from functools import partial

    from hydra.utils import get_class, get_method, instantiate

    task = instantiate(cfg.dataset)  # before anything slow is imported: its names are what is mistyped most

    from unlearning import loggers
    from unlearning.run import Run

    method, model = get_class(cfg.method._target_), get_method(cfg.model._target_).__self__
    if not issubclass(model, method.works_on):
        raise UserError(f"{method.__name__} works on a {method.works_on.__name__}; a {model.__name__} is none.")
    logger = loggers.build(cfg.get("logger"))
    trainer = instantiate(cfg.trainer, logger=logger)
    needs = {"trainer": trainer} if OmegaConf.is_missing(cfg.method, "trainer") else {}
    work = Run(
        folder=Path(cfg.paths.output_dir),
        store=Path(cfg.paths.store),
        load_model=partial(instantiate, cfg.model),
        task=task,
        method=instantiate(cfg.method, **needs),
        sampler=instantiate(cfg.sampler),
        evaluators={name: instantiate(evaluator) for name, evaluator in cfg.get("evaluator", {}).items()},
        trainer=trainer,
        seed=cfg.seed,
        logger=logger,
        title=cfg.title,
        settings=OmegaConf.to_container(cfg, resolve=True),
    )
    try:
        return work.execute(cfg.stages)
    finally:
        loggers.close(logger)


@hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")
def compose_and_run(cfg: DictConfig) -> None:
    from rich.console import Console

    from unlearning.reporting.summary import summary

    metrics = run(cfg)
    if int(os.environ.get("LOCAL_RANK", 0)):
        return  # the first process of a distributed run tells
    console = Console()
    console.print(summary(metrics))
    console.print(f"[bold]{Path(cfg.paths.output_dir) / 'report.html'}[/bold] shows the pictures.", soft_wrap=True)
    if skipped := metrics.get("cost/skipped"):
        raise UserError(f"Everything else is done, but {skipped} rows were skipped; each is named in a warning above.")
    if failed := metrics.get("cost/failed"):
        raise UserError(f"Everything else is done, but {failed} pictures could not be made; warnings above say why.")


def main() -> None:
    """The console command. A mistake of the user's ends in one message and exit code 1, not in a traceback."""
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing, so that the message can be ours
    try:
        compose_and_run()
    except (HydraException, OmegaConfBaseException, UserError, OSError) as error:
        sys.exit(_message(error))
    except (KeyboardInterrupt, SystemExit) as stop:
        if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):  # Lightning exits
            sys.exit("Interrupted. The same command goes on from here.")
        raise


def _message(error: BaseException) -> str:
    """What to tell the user. Raises the error again if it is a fault of the program's."""
    from unlearning.suggestions import explain

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

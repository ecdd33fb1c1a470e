"""Messages of the command line for a run that ends with missing results, or with an error."""

import errno
from collections.abc import Mapping, Sequence
from pathlib import Path

from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from unlearning.errors import UserError

AGAIN = "The same command goes on from here."
INTERRUPTED = f"Interrupted. {AGAIN}"
INCOMPLETE = {  # by the number in metrics.json that counts what is missing
    "cost/skipped": "images or rows that were skipped: {}. The warnings above name them.",
    "cost/failed": "images that could not be generated: {}. The warnings above say why.",
    "cost/silent": "evaluators that measured nothing: {}. The warnings above say what they need.",
    "cost/unmeasured": "measurements that failed: {}. The warnings above say why; the same command tries again.",
}
RETRIED = {"cost/failed", "cost/unmeasured"}  # the same command may still complete these
READ_ONLY = (errno.EROFS, errno.EACCES, errno.EPERM)
KILLED = ("TerminatedWorkerError", "UncompletedJobError")  # joblib's and submitit's errors for a killed worker


def incomplete(metrics: Mapping[str, float | str]) -> list[str]:
    """One sentence for each kind of missing results of a run."""
    return [f"Done, except for {text.format(metrics[name])}" for name, text in INCOMPLETE.items() if name in metrics]


def is_interruption(stop: BaseException) -> bool:
    """Whether the program was ended by Ctrl-C or SIGTERM, which Lightning turns into exceptions of its own."""
    from_lightning = isinstance(stop.__context__, KeyboardInterrupt) or type(stop).__name__ == "SIGTERMException"
    return isinstance(stop, KeyboardInterrupt) or from_lightning


def error_message(error: BaseException, conf: Path, argv: Sequence[str]) -> str:
    """The message for an error that the user can fix. Raises any other error again: it is a fault of the program.

    Args:
        error: The error that ended the run.
        conf: The folder of the configuration.
        argv: The command line.
    """
    if type(error).__name__ in KILLED:
        return (
            "\nA process that ran jobs was killed, most often by the system because memory ran out. Fewer jobs at once "
            f"(hydra.launcher.n_jobs=1) need less memory. {AGAIN}"
        )
    if not isinstance(error, HydraException | OmegaConfBaseException | UserError | OSError | YAMLError):
        raise error
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, UserError):
        cause = cause.__cause__
    if cause is not None:
        return f"\n{cause}"
    if isinstance(error, OSError) and not isinstance(error, HydraException):
        if error.errno in READ_ONLY:
            return f"\n{error}\nTake files that can be read, and folders to write to: paths.runs=... paths.store=..."
        return f"\n{error}\nWhat was finished is kept; the same command goes on from here."
    if type(error).__name__ == "InstantiationException":
        raise error
    from unlearning.config.suggestions import explain

    return explain(error, conf, argv)

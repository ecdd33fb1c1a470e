"""What a sweep does beyond its runs: a failed job is written down and the others go on; a study is taken up again.

Hydra tells these callbacks (hydra.callbacks) when a sweep and a job begin and end, whichever the launcher. A launcher
takes them along to its worker processes as they were when the sweep began.
"""

import json
import logging
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from hydra.core.utils import JobReturn, JobStatus
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from unlearning.config.decisive import groups
from unlearning.errors import UserError
from unlearning.store.files import digest, write_atomically

log = logging.getLogger(__name__)
CHANGE_NO_TRIAL = ("hydra", "logger")  # of what a study is told; the search itself is hydra.sweeper's


class JobFailed(UserError):
    """A job of a sweep, by its reason: one line that any process can pass on to another."""


class Failures(Callback):
    """Writes into a failed job's folder (failed.json), and into a list of the sweep's, why it failed.

    Hydra is then told that the job is over, and launches the next; a sweeper that learns from what jobs return, because
    there is an `objective`, is told that it has failed. A sweep whose jobs would overwrite each other never begins, and
    the processes that a launcher starts end with the one that began the sweep.
    """

    latest: ClassVar[Path | None] = None  # of the last sweep that this process began

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        self.failed = Failures.latest = Path(config.hydra.sweep.dir).absolute() / ".failed" / f"{uuid4().hex}.jsonl"
        if clash := _clash(config):  # an error would be a warning to Hydra, so this ends the program itself
            sys.exit(clash)

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        _end_with_parent()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        folder = Path(config.hydra.runtime.output_dir)
        if job_return.status is JobStatus.COMPLETED:
            (folder / "failed.json").unlink(missing_ok=True)
        elif hasattr(self, "failed"):
            error = job_return._return_value
            told = {"folder": str(folder), "job": list(job_return.overrides or ()), "error": reason(error)}
            # The error itself may not survive a trip between processes.
            job_return.return_value = JobFailed(told["error"])
            if config.get("objective") is None:
                job_return.status, job_return.return_value = JobStatus.COMPLETED, None
            log.error("Failed: %s", told["error"])
            self.failed.parent.mkdir(parents=True, exist_ok=True)
            with self.failed.open("a") as file:  # a short line is appended in one piece
                file.write(json.dumps(told) + "\n")
            write_atomically(folder / "failed.json", json.dumps(told | {"traceback": _trace(error)}, indent=2))


def reason(error: BaseException) -> str:
    """One line: what a mistake's message says, or what kind of fault it was and where the program says it lies."""
    while error.__cause__ is not None and not isinstance(error, UserError):
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, UserError) else f"{type(error).__name__}: {lines[0]}".rstrip(": ")


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))


def failures() -> str:
    """Which jobs of this process's last sweep failed, and why: a line each; nothing if none did."""
    if Failures.latest is None or not Failures.latest.exists():
        return ""
    failed = [json.loads(line) for line in Failures.latest.read_text().splitlines()]
    Failures.latest.unlink()
    lines = [f"{os.path.relpath(job['folder'])}: {job['error']}" for job in failed]
    count = "1 job" if len(failed) == 1 else f"{len(failed)} jobs"
    return "\n".join([f"\n{count} failed; the others are done. The same command tries again what is missing.", *lines])


def _clash(config: DictConfig) -> str:
    """Why a sweep cannot begin: two values of a setting would have one folder. Nothing if each has its own.

    Each setting is varied by itself: to compose every job would take as long as Hydra does.
    """
    hydra, loader, values = HydraConfig.instance(), GlobalHydra.instance().config_loader(), _values(config)
    before, first = hydra.cfg, [own[0] for own in values]
    try:
        for i, own in enumerate(values):
            folders = {}
            for told in dict.fromkeys(own) if len(own) > 1 else ():
                composed = loader.load_sweep_config(config, [*first[:i], told, *first[i + 1 :]])
                hydra.set_config(composed)  # for ${hydra:...}
                folder = os.path.join(composed.hydra.sweep.dir, composed.hydra.sweep.subdir)
                if (other := folders.setdefault(folder, told)) != told:
                    return (
                        f"The jobs of `{other}` and `{told}` would have one folder, {os.path.relpath(folder)}, and the "
                        f"second would overwrite the first: only concept, {', '.join(groups())} name a folder. "
                        "Evaluators go together into one run: evaluator=[accuracy,fid]. NudeNet's boxes are counted by "
                        "another rule afterwards: python -m unlearning.evaluators.nudenet --help. For anything else "
                        "give one command each, with a paths.runs=... of its own."
                    )
    except (HydraException, OmegaConfBaseException):
        pass  # a mistake, which the sweeper or the job tells
    finally:
        hydra.cfg = before
    return ""


def _values(config: DictConfig) -> list[list[str]]:
    """Of each setting that the sweep is told, the overrides by which jobs are told it; of an interval, its ends.

    A study draws what it tries, so of what it searches the ends are enough.
    """
    found = []
    for key, override in _told(config).items():
        value = override.value()
        if isinstance(value, IntervalSweep):
            values = [value.start, value.end]
        elif override.is_sweep_override():
            values = list(override.sweep_string_iterator())
            values = [values[0], values[-1]] if "n_trials" in config.hydra.sweeper else values
        else:
            values = [override.get_value_element_as_str()]
        found.append([f"{key}={value}" for value in values])
    return found


def _told(config: DictConfig) -> dict[str, Override]:
    """What the sweeper's own settings and then the command line tell the jobs, by name."""
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())  # which knows what glob(*) stands for
    overrides = parser.parse_overrides([*params, *config.hydra.overrides.task])
    return {override.get_key_element(): override for override in overrides}


@cache
def _end_with_parent() -> None:
    """Kills this process once that which made it is gone, even by SIGKILL; one that was not made by another stays.

    Otherwise a worker would finish its job, and those in its queue, unseen. A run may be killed at any time.
    """
    parent = multiprocessing.parent_process()

    def watch() -> None:
        while os.getppid() == parent.pid:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    if parent:
        threading.Thread(target=watch, daemon=True).start()


class Study(Callback):
    """Takes up a stored study of Optuna's where it was left: `n_trials` counts all of its trials, those before too.

    A trial that was interrupted is made again first; its run goes on from where it was. To the study's name a digest is
    added of what is searched, for which objective, and of all that is fixed: trials of another search are no answer.
    """

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        if not OmegaConf.select(config, "hydra.sweeper.storage"):
            return
        if config.get("objective") is None:  # an error would be a warning to Hydra, so this ends the program itself
            sys.exit("A study needs to know what to learn from: objective=efficacy/acc_e, say, or several in a list.")
        logging.getLogger("alembic").setLevel(logging.WARNING)  # which would introduce each of its plugins
        import optuna

        sweeper = config.hydra.sweeper
        Path(config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)  # where the study is stored
        directions = [sweeper.direction] if isinstance(sweeper.direction, str) else list(sweeper.direction)
        with read_write(config):
            sweeper.study_name = f"{sweeper.study_name} {_search(config, directions)}"
        study = optuna.create_study(
            storage=sweeper.storage, study_name=sweeper.study_name, directions=directions, load_if_exists=True
        )
        trials = study.get_trials(deepcopy=False)
        warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)  # enqueue_trial, since 2020
        known = [trial.params for trial in trials if trial.state.is_finished()]
        known += [trial.system_attrs.get("fixed_params") for trial in trials if trial.state.name == "WAITING"]
        for trial in trials:
            if trial.state.name == "RUNNING" and trial.params and trial.params not in known:
                study.enqueue_trial(trial.params)
                known.append(trial.params)
        with read_write(config):
            sweeper.n_trials = max(0, sweeper.n_trials - sum(trial.state.is_finished() for trial in trials))


def _search(config: DictConfig, directions: Sequence[str]) -> str:
    """A digest of what a study is: the objective and where it is to go, what is searched, and what is fixed."""
    fixed = OmegaConf.to_container(config, resolve=False)
    fixed = {name: value for name, value in fixed.items() if name not in CHANGE_NO_TRIAL}
    searched = {key: override.input_line for key, override in _told(config).items() if override.is_sweep_override()}
    return digest(fixed, dict(config.hydra.sweeper.get("params") or {}), searched, directions)[:8]


def check_objective(names: str | Sequence[str] | None, known: Iterable[str]) -> None:
    """Raises UserError for a name that is not among the `known` metrics; it names the nearest."""
    known = {*known}
    for name in [names] if isinstance(names, str) else names or ():
        if name not in known:
            near = get_close_matches(name, known, n=3, cutoff=0.4)
            meant = f"Did you mean {' or '.join(near)}?" if near else f"There are: {', '.join(sorted(known))}."
            raise UserError(f"The objective {name!r} is no metric of this run. {meant}")


def objective(names: str | Sequence[str] | None, metrics: Mapping[str, float | str]) -> float | list[float] | None:
    """What a sweeper is told of a run: the metric or metrics that the config names.

    Raises UserError where one was not measured, or is no number: a failed measurement is never a good value.
    """
    if names is None:
        return None
    check_objective(names, (name for name, value in metrics.items() if not isinstance(value, str)))
    values = [float(metrics[name]) for name in ([names] if isinstance(names, str) else names)]
    if not all(map(math.isfinite, values)):
        raise UserError(f"The objective came to {values}, from which no sweeper can learn.")
    return values[0] if isinstance(names, str) else values

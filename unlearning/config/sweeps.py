"""Hydra callbacks for sweeps: folders are checked before the first job, and a failed job is recorded and skipped.

Hydra calls them (hydra.callbacks) at the beginning and the end of a sweep and of each job, with every launcher. A
launcher sends them to its worker processes in the state that they had when the sweep began.
"""

import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
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
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from unlearning.config.decisive import groups
from unlearning.errors import UserError
from unlearning.store.files import write_atomically

log = logging.getLogger(__name__)


class JobFailed(UserError):
    """A failed job of a sweep: one line with the reason, which can be sent between processes."""


class Failures(Callback):
    """Records why a job failed: in failed.json in the job's folder, and in a list of the whole sweep.

    To Hydra the job has ended, so that it launches the next; with an `objective`, the job stays failed for the sweeper.
    A sweep whose jobs would overwrite each other does not begin. Worker processes end with the process that began the
    sweep.
    """

    latest: ClassVar[Path | None] = None  # the list of failures of this process's last sweep

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:
        self.failed = Failures.latest = Path(config.hydra.sweep.dir).absolute() / ".failed" / f"{uuid4().hex}.jsonl"
        if clash := _clash(config):
            sys.exit(clash)  # Hydra would turn an exception into a warning

    def on_job_start(self, config: DictConfig, **_: Any) -> None:
        _end_with_parent()
        if OmegaConf.select(config, "trainer.devices") == 1:
            _take_one_gpu()

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        folder = Path(config.hydra.runtime.output_dir)
        if job_return.status is JobStatus.COMPLETED:
            (folder / "failed.json").unlink(missing_ok=True)
        elif hasattr(self, "failed"):  # a sweep, not a single run
            error: BaseException = job_return._return_value
            record = {"folder": str(folder), "job": list(job_return.overrides or ()), "error": reason(error)}
            job_return.return_value = JobFailed(record["error"])  # the error itself may not be picklable
            if config.get("objective") is None:
                job_return.status, job_return.return_value = JobStatus.COMPLETED, None
            log.error("Failed: %s", record["error"])
            self.failed.parent.mkdir(parents=True, exist_ok=True)
            with self.failed.open("a") as file:  # a short line is appended in one piece
                file.write(json.dumps(record) + "\n")
            trace = "".join(traceback.format_exception(error))
            write_atomically(folder / "failed.json", json.dumps(record | {"traceback": trace}, indent=2))


def reason(error: BaseException) -> str:
    """Why a job failed, in one line: the message of a UserError; of another error, its type too."""
    while error.__cause__ is not None and not isinstance(error, UserError):
        error = error.__cause__
    lines = str(error).strip().splitlines() or [""]
    return lines[0] if isinstance(error, UserError) else f"{type(error).__name__}: {lines[0]}".rstrip(": ")


def failures() -> str:
    """The failed jobs of this process's last sweep with their reasons, a line each; "" if none failed."""
    if Failures.latest is None or not Failures.latest.exists():
        return ""
    failed = [json.loads(line) for line in Failures.latest.read_text().splitlines()]
    Failures.latest.unlink()
    lines = [f"{os.path.relpath(job['folder'])}: {job['error']}" for job in failed]
    count = "1 job" if len(failed) == 1 else f"{len(failed)} jobs"
    return "\n".join([f"\n{count} failed. The same command runs what is missing.", *lines])


def sweep_overrides(config: DictConfig) -> dict[str, Override]:
    """All overrides of a sweep by the names of their settings. The command line's replace those of the sweeper."""
    params = [f"{key}={value}" for key, value in (config.hydra.sweeper.get("params") or {}).items()]
    parser = OverridesParser.create(GlobalHydra.instance().config_loader())  # which resolves glob(*)
    overrides = parser.parse_overrides([*params, *config.hydra.overrides.task])
    return {override.get_key_element(): override for override in overrides}


def _clash(config: DictConfig) -> str:
    """The message for two values of a setting that share a folder; "" if each value has its own.

    Each setting is varied alone: composing every job would take too long.
    """
    hydra, loader, values = HydraConfig.instance(), GlobalHydra.instance().config_loader(), _values(config)
    before, first = hydra.cfg, [own[0] for own in values]
    try:
        for i, own in enumerate(values):
            folders: dict[str, str] = {}
            for override in dict.fromkeys(own) if len(own) > 1 else ():
                composed = loader.load_sweep_config(config, [*first[:i], override, *first[i + 1 :]])
                hydra.set_config(composed)  # for ${hydra:...}
                folder = os.path.join(composed.hydra.sweep.dir, composed.hydra.sweep.subdir)
                if (other := folders.setdefault(folder, override)) != override:
                    return (
                        f"The jobs of `{other}` and `{override}` would have one folder, {os.path.relpath(folder)}, and "
                        "the second would overwrite the first. A folder is named by concept, "
                        f"{', '.join(groups())}, without settings that change no image. "
                        "Choose evaluators, or attacks, together for one run: evaluator=[accuracy,fid]. Count "
                        "NudeNet's boxes by another rule afterwards: python -m unlearning.evaluators.nudenet --help. "
                        "For anything else, type one command each, with its own paths.runs=..."
                    )
    except (HydraException, OmegaConfBaseException):
        pass  # the sweeper or the job reports it
    finally:
        hydra.cfg = before
    return ""


def _values(config: DictConfig) -> list[list[str]]:
    """For each setting of the sweep, its overrides. A study draws its values, so the first and the last are enough."""
    is_study = "n_trials" in config.hydra.sweeper
    settings = []
    for key, override in sweep_overrides(config).items():
        value = override.value()
        if isinstance(value, IntervalSweep):
            values = [str(value.start), str(value.end)]
        elif override.is_sweep_override():
            values = list(override.sweep_string_iterator())
            values = [values[0], values[-1]] if is_study else values
        else:
            values = [override.get_value_element_as_str()]
        settings.append([f"{key}={value}" for value in values])
    return settings


@cache
def _take_one_gpu() -> None:
    """Lets this process, if it is one of a launcher's workers, see one of the GPUs: the first worker the first."""
    number = multiprocessing.current_process().name.rpartition("-")[2]  # of a worker of joblib: LokyProcess-1, ...
    if multiprocessing.parent_process() is None or not number.isdigit():
        return
    import torch

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(i) for i in range(torch.cuda.device_count())]
    if len(gpus) > 1:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpus[(int(number) - 1) % len(gpus)]  # read when CUDA is first used


@cache
def _end_with_parent() -> None:
    """Starts a thread that kills this process when its parent process has gone, even by SIGKILL.

    Otherwise a worker would go on with its job and those in its queue. A run may be killed at any time.
    """
    parent = multiprocessing.parent_process()

    def watch(pid: int | None) -> None:
        while os.getppid() == pid:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    if parent:
        threading.Thread(target=watch, args=[parent.pid], daemon=True).start()

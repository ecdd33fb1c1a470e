"""Studies: sweeps in which Optuna chooses the settings, and learns from the objective of each run.

unlearn -m hydra/sweeper=study method=uce 'method.lamb=interval(0.1,1)' objective=efficacy/acc_e
"""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from unlearning.config.naming import config_hash
from unlearning.config.sweeps import sweep_overrides
from unlearning.errors import UserError, nearest, suggest
from unlearning.store.files import digest

if TYPE_CHECKING:
    import optuna
    from optuna.distributions import BaseDistribution

TARGET = "hydra_plugins.unlearning.Study"  # Hydra takes sweepers from the package hydra_plugins alone
log = logging.getLogger(__name__)


def register() -> None:
    """Makes `_target_: hydra_plugins.unlearning.Study` known to Hydra as a sweeper."""
    Plugins.instance().class_name_to_class[TARGET] = Study


class Study(Sweeper):
    """A study that is stored, and continued by the same command until it has `n_trials`.

    A trial that was interrupted runs again first; its run goes on from where it stopped. A failed job fails its trial.
    To the study's name a hash is added of what is searched, of the objective and of all fixed settings, since trials of
    another search are no answer.

    Args:
        study_name: The first part of the study's name.
        storage: An SQLAlchemy URL.
        direction: "minimize" or "maximize"; for several objectives a list, one for each.
        n_trials: Finished trials of the study, earlier ones included.
        n_jobs: Trials that run at the same time.
        sampler: The config of an Optuna sampler.
        params: Overrides that the study searches or fixes, by the names of their settings.
    """

    def __init__(
        self,
        *,
        study_name: str,
        storage: str,
        direction: str | Sequence[str] = "minimize",
        n_trials: int = 30,
        n_jobs: int = 1,
        sampler: DictConfig | None = None,
        params: Mapping[str, Any] | None = None,
    ) -> None:
        self.name, self.storage, self.n_trials, self.n_jobs = study_name, storage, n_trials, n_jobs
        self.directions = [direction] if isinstance(direction, str) else list(direction)
        self.sampler = sampler  # `params` are read from the config, together with the overrides of the command line

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self._config = config
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Runs trials until the study has `n_trials`, and writes the best into optimization_results.yaml.

        Raises:
            UserError: Without an objective, without Optuna, or if the storage cannot be used.
        """
        if self._config.get("objective") is None:
            raise UserError("A study needs an objective: objective=efficacy/acc_e, or several in a list.")
        overrides = sweep_overrides(self._config)
        searched = {key: override for key, override in overrides.items() if override.is_sweep_override()}
        fixed = [f"{key}={o.get_value_element_as_str()}" for key, o in overrides.items() if key not in searched]
        study = self._study({key: override.input_line for key, override in searched.items()})
        space = {key: distribution(override) for key, override in searched.items()}
        _enqueue_interrupted(study)
        launched = 0
        while (left := self.n_trials - _finished(study)) > 0:
            trials = [study.ask(space) for _ in range(min(left, self.n_jobs))]
            jobs = [[*(f"{key}={value}" for key, value in trial.params.items()), *fixed] for trial in trials]
            results = self._launcher.launch(jobs, initial_job_idx=launched)
            launched += len(jobs)
            for trial, result in zip(trials, results, strict=True):
                _tell(study, trial, result)
        self._report(study)

    def _study(self, searched: Mapping[str, str | None]) -> "optuna.Study":
        try:
            import optuna
        except ImportError:
            raise UserError("A study needs Optuna: pip install 'concept-unlearning[sweeps]'") from None
        logging.getLogger("alembic").setLevel(logging.WARNING)  # it would log each of its plugins
        Path(self._config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)
        fixed = config_hash(self._config, "numbers")
        name = f"{self.name} {digest(fixed, _as_list(self._config.objective), searched, self.directions)[:8]}"
        try:
            return optuna.create_study(
                storage=self.storage,
                sampler=instantiate(self.sampler) if self.sampler else None,
                study_name=name,
                directions=self.directions,
                load_if_exists=True,
            )
        except (RuntimeError, optuna.exceptions.StorageInternalError) as error:
            raise UserError(f"The study cannot be stored in {self.storage}: {error}") from error

    def _report(self, study: "optuna.Study") -> None:
        best = [{"params": trial.params, "values": trial.values} for trial in study.best_trials]
        log.info("Study %r: %d of %d trials are best.", study.study_name, len(best), _finished(study))
        for trial in best:
            log.info("    %s: %s", trial["values"], ", ".join(f"{k}={v}" for k, v in trial["params"].items()))
        results = OmegaConf.create({"study": study.study_name, "best": best})
        OmegaConf.save(results, Path(self._config.hydra.sweep.dir) / "optimization_results.yaml")


def distribution(override: Override) -> "BaseDistribution":
    """The distribution from which trials draw the value of a setting.

    `interval(a, b)` is uniform on [a, b], and `int(interval(a, b))` over its whole numbers; with `tag(log, ...)` around
    it, uniform in the logarithm. `range(a, b, step)` is uniform over its numbers. Choices and globs are categorical.
    """
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    value = override.value()
    if isinstance(value, IntervalSweep):
        kind = IntDistribution if isinstance(value.start, int) and isinstance(value.end, int) else FloatDistribution
        return kind(value.start, value.end, log="log" in value.tags)
    if isinstance(value, RangeSweep):
        numbers = sorted(float(x) for x in override.sweep_string_iterator())
        if isinstance(value.start, int) and isinstance(value.stop, int) and isinstance(value.step, int):
            return IntDistribution(int(numbers[0]), int(numbers[-1]), step=abs(value.step))
        return FloatDistribution(numbers[0], numbers[-1], step=abs(float(value.step)))
    return CategoricalDistribution(list(override.sweep_string_iterator()))


def _finished(study: "optuna.Study") -> int:
    return sum(trial.state.is_finished() for trial in study.get_trials(deepcopy=False))


def _enqueue_interrupted(study: "optuna.Study") -> None:
    """Enqueues trials that were running when the study was stopped, unless they have run or been enqueued since."""
    trials = study.get_trials(deepcopy=False)
    later: list[dict | None] = [trial.params for trial in trials if trial.state.is_finished()]
    later += [trial.system_attrs.get("fixed_params") for trial in trials if trial.state.name == "WAITING"]
    for trial in trials:
        if trial.state.name == "RUNNING" and trial.params and trial.params not in later:
            study.enqueue_trial(trial.params)
            later.append(trial.params)


def _tell(study: "optuna.Study", trial: "optuna.Trial", result: JobReturn) -> None:
    from optuna.trial import TrialState

    if result.status is JobStatus.COMPLETED:
        study.tell(trial, _as_list(result.return_value))
    else:
        study.tell(trial, state=TrialState.FAIL)


def check_objective(names: str | Sequence[str] | None, metrics: Iterable[str]) -> None:
    """Raises UserError for an objective that is not among the `metrics`; the message suggests the nearest."""
    metrics = sorted({*metrics})
    for name in _as_list(names):
        if name not in metrics:
            hint = suggest(nearest(name, metrics, 3, 0.4)) or f" Metrics: {', '.join(metrics)}."
            raise UserError(f"The objective {name!r} is no metric of this run.{hint}")


def objective(names: str | Sequence[str] | None, metrics: Mapping[str, float | str]) -> float | list[float] | None:
    """The value that a study learns from: that of the metric `names`, or those of several.

    Raises:
        UserError: If one was not measured or is not finite. A failed measurement is never a good value.
    """
    if names is None:
        return None
    check_objective(names, (name for name, value in metrics.items() if not isinstance(value, str)))
    values = [float(metrics[name]) for name in _as_list(names)]
    if not all(map(math.isfinite, values)):
        raise UserError(f"The objective is {values}: a study cannot learn from numbers that are not finite.")
    return values[0] if isinstance(names, str) else values


def _as_list(value: Any) -> list:
    if value is None:
        return []
    return [value] if isinstance(value, str | int | float) else list(value)

"""One run: fit -> generate -> evaluate -> report. Disk is the interface; every stage goes on where it was left."""

import fcntl
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pytorch_lightning as pl
from tqdm import tqdm

from unlearning import cost, loggers
from unlearning.concepts import UnlearningTask, UserError
from unlearning.erasure import Erasure, WeightPatch
from unlearning.evaluators.base import Evaluator
from unlearning.images import Row, digest, load, manifest, read_manifest, write_atomically, write_manifest
from unlearning.methods.base import Method
from unlearning.models.base import DiffusionModel
from unlearning.reporting.report import report
from unlearning.sampling.generation import generate
from unlearning.sampling.sampler import Sampler

log = logging.getLogger(__name__)
STAGES = ("fit", "generate", "evaluate", "report")


@dataclass
class Run:
    """
    Args:
        folder: The run's own: erasure/, images/ (manifests), metrics.json, report.html.
        store: Pictures and evaluations that all runs share, each under a digest of what it depends on.
        load_model: Loads the model; called by the stages that need it.
        evaluators: By name.
        trainer: Makes a Lightning Trainer.
        logger: Lightning loggers, told the settings, the numbers and some pictures.
        title: What the erasure is called in its README.
    """

    folder: Path
    store: Path
    load_model: Callable[[], DiffusionModel]
    task: UnlearningTask
    method: Method
    sampler: Sampler
    evaluators: Mapping[str, Evaluator]
    trainer: Callable[..., pl.Trainer]
    seed: int = 0
    logger: Sequence = ()
    title: str = "An erased concept"
    settings: dict = field(default_factory=dict)

    @cached_property
    def model(self) -> DiffusionModel:
        return self.load_model()

    def execute(self, stages: Sequence[str] = STAGES) -> dict[str, float | str]:
        """Runs the stages in their order; returns what metrics.json holds, if anything does.

        Raises UserError for an unknown stage, or if another process is at work in the folder.
        """
        unknown = set(stages) - set(STAGES)
        if unknown:
            raise UserError(f"There is no stage {sorted(unknown)[0]!r}; there are {', '.join(STAGES)}.")
        with alone_in(self.folder):
            for stage in STAGES:
                if stage in stages:
                    log.info("%s: %s", self.title, stage)
                    getattr(self, stage)()
        path = self.folder / "metrics.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def fit(self) -> None:
        """Finds the erasure, unless this model's is there already."""
        target = self.folder / "erasure"
        if target.exists() and Erasure.base_of(target) == self.model.fingerprint:
            return
        pl.seed_everything(self.seed, workers=True, verbose=False)
        with cost.measured(self.folder / "cost.json", "fit", self.model):
            erasure = self.method.fit(self.model, self.task)
        partial = self.folder / ".erasure.partial"
        shutil.rmtree(partial, ignore_errors=True)
        erasure.save(partial, title=self.title, base=self.model)
        shutil.rmtree(target, ignore_errors=True)
        partial.rename(target)
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)

    def generate(self) -> None:
        """Draws the evaluation's prompts with the base model, where no run has yet, and with the erased one."""
        erasure = Erasure.load(self.folder / "erasure")
        for name, edit in (("base", WeightPatch({})), ("erased", erasure)):
            place = digest(self.model.fingerprint, str(self.model.dtype), edit.fingerprint, self.sampler.protocol)
            rows = manifest(self.store / "images" / place, self.task, self.seed)
            with cost.measured(self.folder / "cost.json", f"generate {name}", self.model), edit.applied_to(self.model):
                generate(self.model, self.sampler, rows, self.trainer)
            write_manifest(self.folder / "images" / f"{name}.csv", rows)

    def evaluate(self) -> None:
        """Measures the pictures; an evaluation that some run has made before is read from the store."""
        metrics = {}
        for prefix, name in (("base/", "base"), ("", "erased")):
            path = self.folder / "images" / f"{name}.csv"
            if not path.exists():
                raise UserError(f"There is no {path}: run the generate stage first.")
            rows = read_manifest(path)
            for label, evaluator in self.evaluators.items():
                for key, value in self._evaluation(rows, evaluator, f"{label} of {name}").items():
                    metrics[prefix + key] = value
        metrics |= cost.metrics(self.folder / "cost.json", self.folder / "erasure")
        write_atomically(self.folder / "metrics.json", json.dumps(metrics, indent=2))
        numbers = {k: v for k, v in metrics.items() if not isinstance(v, str)}
        shown = {name: load(read_manifest(self.folder / "images" / f"{name}.csv")[:8]) for name in ("base", "erased")}
        loggers.log(self.logger, numbers, {k: list(v) for k, v in shown.items()}, self.settings)

    def _evaluation(self, rows: Sequence[Row], evaluator: Evaluator, label: str) -> dict[str, float | str]:
        asked = [(row.path.parent.name, row.path.name, row.role, row.labels) for row in rows]
        evaluator.reset()
        evaluator.prepare(self.task)
        path = self.store / "evaluations" / f"{digest(self.task.name, asked, evaluator.protocol)}.json"
        if not path.exists():
            size = self.sampler.batch_size
            for i in tqdm(range(0, len(rows), size), label, leave=False):
                evaluator.update(load(rows[i : i + size]), rows[i : i + size])
            results = {}
            for key, value in evaluator.compute().items():
                results |= {key: value, f"{key}/protocol": evaluator.protocol}
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(results, indent=2))
        return json.loads(path.read_text())

    def report(self) -> None:
        """Writes report.html."""
        log.info("look at %s", report(self.folder))


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds the folder's lock. Raises UserError if another process does."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"Another run is at work in {folder}. Wait for it, or change a setting.") from None
        yield

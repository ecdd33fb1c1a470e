"""Evaluates the drawings of a run, and names the metrics."""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from unlearning.attacks.base import Attack
from unlearning.evaluators.base import Evaluator
from unlearning.stages.drawings import ATTACKED, BASE, ERASED, Rows
from unlearning.store.evaluations import evaluation, lines
from unlearning.store.files import write_atomically
from unlearning.store.metrics import Metric
from unlearning.tracking import cost, provenance
from unlearning.training.checkpoints import key_of

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """The evaluation of one run.

    Args:
        evaluators: The evaluators by name, after `Evaluator.prepare`.
        attacks: The run's attacks by name.
        concept: The name of what the run erases.
        store: The folder of evaluations that all runs share.
        folder: The run's folder. Its details/ gets the evaluators' records of each image.
        batch_size: Number of images in memory at once.
        failed: The number of images that could not be generated. The protocols state it.
        targets: The number of images of erased concepts that were asked for, of which an attack may leave out some.
    """

    evaluators: Mapping[str, Evaluator]
    attacks: Mapping[str, Attack]
    concept: str
    store: Path
    folder: Path
    batch_size: int
    failed: int = 0
    targets: int = 0

    def __call__(self, manifests: Rows) -> tuple[dict[str, Metric], list[str]]:
        """The metrics of all drawings, and the names of the evaluators that measured nothing.

        Evaluations of earlier runs are read from the store.
        """
        metrics: dict[str, Metric] = {}
        makers, unmeasured, silent = [], 0, dict(self.evaluators)
        for drawing, rows in manifests.items():
            for label, evaluator in self.evaluators.items():
                about = f"{label} of {drawing}"
                made = evaluation(self.store, self.concept, rows, evaluator, self.batch_size, provenance.code(), about)
                if made.details:
                    (self.folder / "details").mkdir(exist_ok=True)
                    write_atomically(self.folder / "details" / f"{about.replace(' ', '-')}.jsonl", lines(made.details))
                unmeasured += evaluator.failed
                makers.append(made.made_by)
                protocol = made.protocol + self._attacked_by(drawing, len(rows))
                protocol += f", images that could not be generated: {self.failed}" if self.failed else ""
                for key, value in made.values.items():
                    _add(metrics, drawing, key, value, protocol, evaluator.higher_is_better.get(key))
                if made.values:
                    silent.pop(label, None)
        provenance.reuse(self.folder, "evaluations", makers)
        for label, evaluator in silent.items():
            log.warning("%s measured nothing: it needs %s.", label, evaluator.needs)
        metrics |= {"cost/unmeasured": Metric(unmeasured)} if unmeasured else {}
        return metrics, list(silent)

    def _attacked_by(self, drawing: str, count: int) -> str:
        """The attack, and how many images it attacked, as the protocol of its drawing states it; "" for the others."""
        if drawing in (BASE, ERASED):
            return ""
        attack = self.attacks[drawing.removeprefix(ATTACKED)]
        number = f"N = {count}" + (f" of {self.targets}" if count != self.targets else "")
        return f", by {type(attack).__name__} {attack.version} with settings {key_of(attack)[:8]}, {number}"


def _add(
    metrics: dict[str, Metric], drawing: str, key: str, value: float, protocol: str, higher_is_better: bool | None
) -> None:
    """Adds a number: beside that of the base model, or as robustness/ with the name of its attack."""
    if drawing == BASE:
        metrics[key] = Metric(None, higher_is_better=higher_is_better, base=value, base_protocol=protocol)
    elif drawing == ERASED:
        base = metrics.get(key, Metric(None))
        metrics[key] = replace(base, value=value, protocol=protocol, higher_is_better=higher_is_better)
    elif name := attacked_name(key, drawing.removeprefix(ATTACKED)):
        metrics[name] = Metric(value, protocol, higher_is_better)


def attacked_name(key: str, attack: str) -> str | None:
    """The name of a metric on images of an attack: robustness/asr_cce; None if it is not about the concept."""
    purpose, _, name = key.partition("/")
    return f"robustness/{name}_{attack}" if purpose in ("efficacy", "robustness") else None


def metrics_of(evaluators: Iterable[Evaluator], attacks: Iterable[str] = ()) -> set[str]:
    """The names of all metrics that a run with these evaluators and attacks may have."""
    erased = {"efficacy/suppression", *cost.METRICS}.union(*(e.higher_is_better for e in evaluators))
    attacked = {name for attack in attacks for key in erased if (name := attacked_name(key, attack))}
    return erased | {f"base/{name}" for name in erased} | attacked

"""Attacks on an erased model. Each result is kept in the store, under a digest of all that it depends on."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytorch_lightning as pl

from unlearning.attacks.base import Attack
from unlearning.concepts import UnlearningTask
from unlearning.erasures.base import Erasure
from unlearning.models.base import Model
from unlearning.sampling.attack_result import AttackResult, exists, read_record
from unlearning.sampling.sampler import Sampler
from unlearning.store.files import write_atomically
from unlearning.store.loops import kept_in
from unlearning.store.manifest import ManifestRow
from unlearning.store.ranks import first_rank, rank
from unlearning.tracking import cost
from unlearning.training.checkpoints import key_of


@dataclass(frozen=True)
class Victim:
    """The inputs of a run's attacks: all that their results depend on, besides an attack's own settings.

    Args:
        model: The unedited model.
        erasure: The erasure that turns it into the erased model.
        task: The run's task.
        rows: The evaluation's images of erased concepts.
        images: Digests of the images that a method may learn from (stages/keys.py).
        seed: The run's seed.
        store: The folder of images, attacks and evaluations that all runs share.
    """

    model: Model
    erasure: Erasure
    task: UnlearningTask
    rows: Sequence[ManifestRow]
    images: list
    seed: int
    store: Path

    def folder(self, attack: Attack) -> Path:
        """The folder in the store for the result of an attack."""
        transferred = self._place(attack)
        return transferred if exists(transferred) else self._place(attack, self.erasure)

    def _place(self, attack: Attack, *erasure: Erasure) -> Path:
        """The folder of a result. Without an erasure, it is that of an attack that uses only the unedited model."""
        model = (self.model.fingerprint, self.model.numerics, *(own.digest for own in erasure))
        rows = [(row.prompt, row.seed, row.guidance_scale, row.concept, row.labels) for row in self.rows]
        sizes = [(row.height, row.width) for row in self.rows if row.height or row.width]
        task = (self.task.erase, self.task.retain, self.task.template, rows)
        return self.store / "attacks" / key_of(attack, attack.version, model, self.seed, task, self.images, *sizes)

    def attacked(self, name: str, attack: Attack, run: Path, sampler: Sampler) -> None:
        """Runs an attack and saves its result, with the part of the record that all attacks share.

        Args:
            name: The attack's name in the run.
            run: The run's folder; an interrupted attack resumes from its state there.
            sampler: Generates the evaluation's images.
        """
        attack.check_rows(self.model, self.rows)
        pl.seed_everything(self.seed, workers=True, verbose=False)
        stage, costs, place = f"attack {name}", run / "cost.json", self._place(attack, self.erasure)
        begun = run / f".attack-{place.name}-{rank()}"
        if first_rank() and not begun.exists():
            cost.forget(costs, stage)
        begun.mkdir(parents=True, exist_ok=True)
        with kept_in(begun):
            with cost.measured(costs, stage, self.model):
                result = attack.observe(self.model, self.task, self.rows)
                if isinstance(result, AttackResult):  # transferred: it serves every erasure from this model
                    place = self._place(attack)
                else:
                    with self.erasure.applied_to(self.model):
                        result = attack.find(self.model, self.task, self.rows, result)
            record = {"attack": name, "version": attack.version, "access": attack.access, "concept": self.task.name}
            record |= {"base": self.model.fingerprint, "seed": self.seed, "targets": len(self.rows)}
            record |= {"sampler": attack.sampler(sampler).protocol}
            record |= {"cost": cost.read(costs).get(stage, {}), **result.record}
            if first_rank():
                replace(result, record=record).save(place)

    def write_record(self, name: str, attack: Attack, run: Path) -> None:
        """Writes the record of a finished attack into the run's folder: attacks/NAME.json."""
        record = {**read_record(self.folder(attack)), "victim": self.erasure.digest}
        (run / "attacks").mkdir(exist_ok=True)
        write_atomically(run / "attacks" / f"{name}.json", json.dumps(record, indent=2))

"""One run: fit -> attack -> generate -> evaluate -> report. Disk is the interface; every stage can be resumed alone."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast, get_args

import pytorch_lightning as pl

from unlearning.attacks.base import Attack
from unlearning.concepts import ERASE, UnlearningTask
from unlearning.config.values import Stage
from unlearning.erasures.base import Erasure
from unlearning.erasures.composed import composed
from unlearning.errors import UserError
from unlearning.evaluators.base import Evaluator
from unlearning.evaluators.suppression import suppression
from unlearning.methods.base import Method
from unlearning.models.base import Model
from unlearning.reporting.formats import quantity
from unlearning.reporting.run_page import report, teaser
from unlearning.sampling.attack_result import exists
from unlearning.sampling.reconstruction import Reconstruction
from unlearning.sampling.sampler import Sampler
from unlearning.stages.attacks import Victim
from unlearning.stages.drawings import (
    ATTACKED,
    BASE,
    ERASED,
    ORACLE,
    Drawing,
    applied,
    failed,
    read_manifests,
    write_manifests,
)
from unlearning.stages.erasure import KeptErasure, loaded
from unlearning.stages.generation import generate
from unlearning.stages.keys import data_key, fit_key, image_digests
from unlearning.stages.measurement import Measurement
from unlearning.store import metrics as metrics_json
from unlearning.store.files import write_atomically
from unlearning.store.images import read_figures
from unlearning.store.locks import alone_in
from unlearning.store.loops import kept_in
from unlearning.store.manifest import ManifestRow, missing
from unlearning.store.metrics import Metric
from unlearning.store.pruning import describe, note, sign, signed
from unlearning.store.ranks import first_rank, of_first_rank, rank, wait_for_all_ranks
from unlearning.tracking import cost, loggers, provenance
from unlearning.training.checkpoints import key_of
from unlearning.training.trainers import launch

log = logging.getLogger(__name__)
STAGES = get_args(Stage)
SHARED = STAGES[:3]  # stages in which every process of a distributed run takes part


@dataclass
class Run:
    """One run and its five stages.

    Args:
        folder: The run's own folder: erasure/, images/ (manifests), metrics.json, report.html, teaser.png.
        store: Images, attacks and evaluations that all runs share, each under a digest of what it depends on.
        load_model: Loads the model; called by the stages that need it.
        attacks: By name.
        evaluators: By name.
        trainer: Makes a Lightning Trainer.
        after: Folders of earlier erasures, which are applied before this run erases.
        logger: Lightning loggers for settings, numbers and some images.
        title: The title of the erasure's README.
        runs: The folder that this run and others lie in, whose images stay in the store; by default the run's own.
        settings: The resolved config.
        records: Texts by file name, kept beside the numbers: the settings that made them.
        done: Returns whether another run has already done everything. If given, this run waits for a run that works in
            the same folder.
        all_must_measure: Whether evaluators that measure nothing are counted as missing ("cost/silent").
    """

    folder: Path
    store: Path
    load_model: Callable[[], Model]
    task: UnlearningTask
    method: Method
    sampler: Sampler | Reconstruction
    evaluators: Mapping[str, Evaluator]
    trainer: partial[pl.Trainer]
    attacks: Mapping[str, Attack] = field(default_factory=dict)
    after: Sequence[Path] = ()
    seed: int = 0
    logger: Sequence = ()
    title: str = "An erased concept"
    runs: Path | None = None
    settings: dict = field(default_factory=dict)
    records: Mapping[str, str] = field(default_factory=dict)
    done: Callable[[], bool] | None = None
    all_must_measure: bool = False

    @cached_property
    def model(self) -> Model:
        """The unedited model, loaded at first use."""
        return self.load_model()

    def execute(self, stages: Sequence[str] = STAGES) -> metrics_json.Flat:
        """Runs the stages in their order; returns what metrics.json holds, if there is one.

        Raises:
            UserError: For an unknown stage, or if another process is at work in the folder.
        """
        unknown = set(stages) - set(STAGES)
        if unknown:
            raise UserError(f"There is no stage {sorted(unknown)[0]!r}. Stages: {', '.join(STAGES)}.")
        path = self.folder / "metrics.json"
        with alone_in(self.folder, wait=self.done is not None):
            if set(SHARED) & set(stages):
                launch(self.trainer)
            done = self.done is not None and of_first_rank(self.done)
            if first_rank() and not path.exists():
                self._keep_records()
            if not done and {"fit", "generate"} <= set(stages):  # raises UserError before anything is trained
                self.sampler.check(cast(Any, self.model), self._requested)
            for stage in () if done else STAGES:
                if stage in stages and (first_rank() or stage in SHARED):
                    if stage != "attack" or self.attacks:
                        log.info("%s: %s", self.title, stage)
                    start = time.perf_counter()
                    getattr(self, stage)()
                    if (seconds := time.perf_counter() - start) >= 1:
                        log.info("%s: %s took %s", self.title, stage, quantity("cost/seconds", seconds))
        return metrics_json.flat(metrics_json.read(path)) if path.exists() else {}

    # The five stages.

    def fit(self) -> None:
        """Fits the method, unless this run or another one has the erasure. Deletes results of other settings first."""
        self._record(seed=self.seed, model=self.model.fingerprint, data=data_key(self.task, self._images))
        _ = self._oracle  # raises UserError before anything is trained
        for attack in self.attacks.values():
            attack.check_rows(self.model, self._targets)
        key = fit_key(self.model, self.task, self._images, self.settings, self.seed, self._before)
        kept = KeptErasure(self.folder, key)
        if of_first_rank(kept.is_there):
            return
        pl.seed_everything(self.seed, workers=True, verbose=False)
        with kept_in(kept.checkpoints / f"fit-{rank()}"):
            with applied(self._before, self.model), cost.measured(kept.cost, "fit", self.model):
                erasure = self.method.fit(self.model, self.task)
            wait_for_all_ranks()  # the first process deletes what the others write
            if first_rank():
                whole = composed(*self._before, erasure)
                kept.save(whole, title=self.title, base=self.model, figures=self.method.figures)
        wait_for_all_ranks()

    def attack(self) -> None:
        """Runs every attack on the erased model, unless some run has attacked the same model in the same way."""
        for name, attack in self.attacks.items():
            victim = self._victim(self._erasure())
            if not of_first_rank(partial(exists, victim.folder(attack))):
                victim.attacked(name, attack, self.folder, cast(Sampler, self.sampler))
            if first_rank():
                victim.write_record(name, attack, self.folder)
        wait_for_all_ranks()

    def generate(self) -> None:
        """Generates the missing images of the evaluation: with the base model, with the erased model, and attacked.

        If the base or the erased model fails on an image, both manifests leave it out, and it is counted: it is neither
        erased nor retained.
        """
        self._record()
        note(self.store, self.runs or self.folder)
        rows: dict[str, list[ManifestRow]] = {}
        makers: list[dict] = []
        drawings, model = self._drawings(), cast(Any, self.model)  # of the family that the sampler works with
        for drawing in drawings:
            rows[drawing.name] = drawing.rows(self._place(drawing), self._requested, rows)
            with applied(drawing.erasures, model):
                drawing.sampler.check(model, rows[drawing.name])
        for drawing in drawings:
            makers += self._generate(drawing, rows[drawing.name])
        if first_rank():
            provenance.reuse(self.folder, "pictures", makers)
            write_manifests(self.folder / "images", rows)

    def evaluate(self) -> None:
        """Measures the images. Evaluations of earlier runs are read from the store."""
        self._record()
        images = self.folder / "images"
        manifests, lost = read_manifests(images, self._requested, self.attacks), failed(images)
        for evaluator in self.evaluators.values():
            evaluator.prepare(self.task)
        measure = Measurement(
            self.evaluators, self.attacks, self.task.name, self.store, self.folder, self.sampler.batch_size, lost,
            len(self._targets),
        )  # fmt: skip
        metrics, silent = measure(manifests)
        metrics |= {"cost/silent": Metric(len(silent))} if silent and self.all_must_measure else {}
        metrics |= suppression(metrics)
        metrics |= cost.metrics(self.folder / "cost.json", self.folder / "erasure")
        metrics |= {"cost/skipped": Metric(len(self.task.skipped))} if self.task.skipped else {}
        metrics |= {"cost/failed": Metric(lost)} if lost else {}
        self._keep_records()  # until now the folder had the records of the earlier numbers
        metrics_json.write(self.folder / "metrics.json", metrics)
        figures = {caption: [figure] for caption, figure in read_figures(self.folder).items()}
        pairs = list(zip(manifests[BASE], manifests[ERASED], strict=True))
        attacked = {name: manifests[ATTACKED + name] for name in self.attacks}
        loggers.log(self.logger, metrics_json.flat(metrics), figures, self.settings, pairs, attacked)

    def report(self) -> None:
        """Writes report.html, and teaser.png with its images in one strip."""
        report(self.folder)
        teaser(self.folder, self.folder / "teaser.png")

    # Shared by several stages.

    def _keep_records(self) -> None:
        for name, text in self.records.items():
            (self.folder / name).parent.mkdir(exist_ok=True)
            write_atomically(self.folder / name, text)

    def _record(self, **made_of: object) -> None:
        if first_rank():
            provenance.record(self.folder, **made_of)

    @cached_property
    def _images(self) -> list:
        """Digests of the images that a method may learn from."""
        return image_digests(self.task)

    @cached_property
    def _before(self) -> tuple[Erasure, ...]:
        """The earlier erasures. Raises UserError for one that was made from another model."""
        return tuple(loaded(folder, self.model) for folder in self.after)

    def _erasure(self) -> Erasure:
        """The run's finished erasure."""
        return loaded(self.folder / "erasure", self.model)

    @cached_property
    def _oracle(self) -> Erasure | None:
        """The erasure that gives the model which an evaluator compares with; None if no evaluator needs one.

        Raises:
            UserError: If two evaluators compare with different ones.
        """
        oracles = {name: evaluator.oracle for name, evaluator in self.evaluators.items() if evaluator.oracle}
        if len({key_of(oracle) for oracle in oracles.values()}) > 1:
            raise UserError(
                f"{' and '.join(oracles)} compare with different images, and a run generates one set of them. Choose "
                "one of these evaluators; another run measures the other, on the same erasure."
            )
        return next(iter(oracles.values())).fit(self.model, self.task) if oracles else None

    @cached_property
    def _requested(self) -> list[ManifestRow]:
        """The rows of the images that the task asks for. The folder of their paths is a placeholder."""
        return self.sampler.manifest(self.store / "images" / "requested", self.task, self.seed)

    @property
    def _targets(self) -> list[ManifestRow]:
        """The rows of erased concepts, which attacks try to bring back."""
        return [row for row in self._requested if row.role == ERASE]

    def _victim(self, erasure: Erasure) -> Victim:
        """The inputs of the attacks."""
        return Victim(self.model, erasure, self.task, self._targets, self._images, self.seed, self.store)

    def _drawings(self) -> list[Drawing]:
        """The drawings of this run: base, erased, oracle if an evaluator compares with it, and those of the attacks."""
        erasure, own = self._erasure(), self.sampler
        drawings = [Drawing(BASE, (), own), Drawing(ERASED, (erasure,), own)]
        drawings += [Drawing(ORACLE, (self._oracle,), own)] if self._oracle else []
        for name, attack in self.attacks.items():
            sampler = attack.sampler(cast(Sampler, own))
            folder = self._victim(erasure).folder(attack)
            drawings.append(Drawing(f"{ATTACKED}{name}", (erasure,), sampler, folder))
        return drawings

    def _place(self, drawing: Drawing) -> Path:
        """The folder in the store of a drawing's images."""
        return drawing.place(self.store, self.model, self.settings.get("trainer", {}).get("precision"))

    def _generate(self, drawing: Drawing, rows: Sequence[ManifestRow]) -> list:
        """Generates the missing images of a drawing; returns the code version that made each image."""
        place = self._place(drawing)
        erasure = f"{self.title}, seed {self.seed}" if drawing.erasures else "none"
        describe(place, {"model": self.model.name, "erasure": erasure, "sampler": drawing.sampler.protocol})
        if first_rank() and (todo := missing(rows)):
            sign(place, [row.path.name for row in todo], provenance.code())
        stage = f"generate {drawing.name}"
        with cost.measured(self.folder / "cost.json", stage, self.model), applied(drawing.erasures, self.model):
            generate(self.model, drawing.sampler, rows, self.trainer, f"images of {drawing.name}")
        wait_for_all_ranks()
        code = signed(place)
        return [code.get(row.path.name) for row in rows]

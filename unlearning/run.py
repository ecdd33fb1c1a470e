"""One run: fit -> attack -> generate -> evaluate -> report. Disk is the interface; every stage can be resumed alone."""

import hashlib
import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import chain
from pathlib import Path
from typing import Any, cast, get_args

import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.utilities import rank_zero_only

from unlearning.attacks.base import Attack
from unlearning.concepts import ERASE, UnlearningTask
from unlearning.config.decisive import decisive
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
from unlearning.sampling import comeback
from unlearning.sampling.generation import generate
from unlearning.sampling.reconstruction import Reconstruction
from unlearning.sampling.sampler import Sampler
from unlearning.store import metrics as metrics_json
from unlearning.store.evaluations import evaluation, lines
from unlearning.store.files import digest, file_digest, read_state, set_aside, write_atomically
from unlearning.store.finished import state
from unlearning.store.images import figure_paths, write_figures
from unlearning.store.locks import alone_in
from unlearning.store.loops import kept_in
from unlearning.store.manifest import ManifestRow, link_outputs, missing, read_manifest, with_decided, write_manifest
from unlearning.store.metrics import Metric
from unlearning.store.pruning import describe, note, sign, signed
from unlearning.tracking import cost, loggers, provenance
from unlearning.training.checkpoints import key_of

log = logging.getLogger(__name__)
STAGES = get_args(Stage)
SHARED = STAGES[:3]  # stages in which every process of a distributed run takes part
BASE, ERASED, ORACLE, ATTACKED = "base", "erased", "oracle", "attacked-"


@dataclass(frozen=True)
class Drawing:
    """A set of images that a run compares: what is applied to the model, and what is generated with it.

    Args:
        name: "base", "erased", "oracle" or "attacked-NAME"; the manifest is images/NAME.csv.
        erasures: Applied to the model, in this order.
        sampler: Draws it.
        attack: The folder of what an attack found; None for the task's own prompts.
    """

    name: str
    erasures: tuple[Erasure, ...]
    sampler: Sampler | Reconstruction
    attack: Path | None = None


@dataclass
class Run:
    """
    Args:
        folder: The run's own: erasure/, images/ (manifests), metrics.json, report.html, teaser.png.
        store: Images, attacks and evaluations that all runs share, each under a digest of what it depends on.
        load_model: Loads the model; called by the stages that need it.
        attacks: By name.
        evaluators: By name.
        trainer: Makes a Lightning Trainer.
        after: Folders of earlier erasures, on top of which this run erases.
        logger: Lightning loggers for settings, numbers and some images.
        title: What the erasure is called in its README.
        runs: The folder that this run and others lie in, whose images stay in the store; by default the run's own.
        settings: The resolved config.
        records: Texts by file name, kept beside the numbers: the settings that made them.
        done: Says whether another run has done all of it. With it, a run at work in the folder is waited for.
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
            done = self.done is not None and self.done()
            if first_rank() and not path.exists():
                self._keep_records()
            for stage in () if done else STAGES:
                if stage in stages and (first_rank() or stage in SHARED):
                    if stage != "attack" or self.attacks:
                        log.info("%s: %s", self.title, stage)
                    start = time.perf_counter()
                    getattr(self, stage)()
                    if (seconds := time.perf_counter() - start) >= 1:
                        log.info("%s: %s took %s", self.title, stage, quantity("cost/seconds", seconds))
        return metrics_json.flat(metrics_json.read(path)) if path.exists() else {}

    def _keep_records(self) -> None:
        for name, text in self.records.items():
            (self.folder / name).parent.mkdir(exist_ok=True)
            write_atomically(self.folder / name, text)

    # fit

    def fit(self) -> None:
        """Finds the erasure, unless it is there. What another model or other settings left is deleted first."""
        self._record(seed=self.seed, model=self.model.fingerprint, data=self._data_key())
        _ = self._oracle  # one that is missing ends the run before anything is trained
        for attack in self.attacks.values():
            attack.check_rows(self.model, self._targets)
        target, begun = self.folder / "erasure", self.folder / ".fit"
        if not begun.exists() or begun.read_bytes() != self._fit_key().encode():
            for old in (target, self.folder / "checkpoints", self.folder / "figures"):
                if old.exists():
                    shutil.rmtree(old)  # an error here is an error: what stays would be taken for the new erasure
            cost.forget(self.folder / "cost.json", "fit")
            write_atomically(begun, self._fit_key())
        if target.exists():
            try:
                Erasure.base_of(target)
                return
            except UserError:
                set_aside(target, "its erasure.json is missing or cannot be read")
                cost.forget(self.folder / "cost.json", "fit")
        if twin := self._twin():
            if first_rank():
                self._take(twin, target)
            return
        pl.seed_everything(self.seed, workers=True, verbose=False)
        with _applied(self._before, self.model), cost.measured(self.folder / "cost.json", "fit", self.model):
            erasure = self.method.fit(self.model, self.task)
        if first_rank():
            self._save(composed(*self._before, erasure), target)
        wait_for_all_ranks()

    def _save(self, erasure: Erasure, target: Path) -> None:
        unfinished = self.folder / ".erasure.partial"
        try:
            erasure.save(unfinished, title=self.title, base=self.model)
            write_figures(self.folder, self.method.figures)
            unfinished.rename(target)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)

    def _twin(self) -> Path | None:
        """Another run of this method that has found the same erasure: it differs in what it measures alone."""
        key = self._fit_key().encode()
        for begun in sorted(self.folder.parent.glob("*/.fit")):
            other = begun.parent
            try:
                if other != self.folder and begun.read_bytes() == key and (other / "erasure").exists():
                    Erasure.load(other / "erasure")
                    return other
            except (OSError, UserError) as error:
                log.warning("the erasure of %s is not taken: %s", other, error)
        return None

    def _take(self, twin: Path, target: Path) -> None:
        """Copies the erasure of another run, its figures, and what it cost."""
        log.info("the erasure is that of %s", twin)
        if (twin / "figures").exists():
            shutil.copytree(twin / "figures", self.folder / "figures", dirs_exist_ok=True)
        cost.take(twin / "cost.json", self.folder / "cost.json", "fit")
        unfinished = self.folder / ".erasure.partial"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(twin / "erasure", unfinished)
        unfinished.rename(target)

    @cached_property
    def _before(self) -> tuple[Erasure, ...]:
        """The earlier erasures. Raises UserError for one that was made from another model."""
        for folder in self.after:
            self._check_base(folder)
        return tuple(Erasure.load(folder) for folder in self.after)

    def _check_base(self, folder: Path) -> None:
        if Erasure.base_of(folder) != self.model.fingerprint:
            raise UserError(
                f"The erasure in {folder} was made from another model than {self.model.name}. Delete the folder to "
                "make it again, or choose the model that it belongs to."
            )

    @cached_property
    def _oracle(self) -> Erasure | None:
        """What makes of the model the one that an evaluator compares the images with; None if none does.

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

    def _erasure(self) -> Erasure:
        """The run's finished erasure."""
        erasure = Erasure.load(self.folder / "erasure")
        self._check_base(self.folder / "erasure")
        return erasure

    def _fit_key(self) -> str:
        """A digest of all that the erasure depends on: model, method, trainer, seed, earlier erasures, known data."""
        known = (self.task.erase, self.task.retain, self.task.template)
        decided = decisive(self.settings, "erasure")
        settings = (decided.get("method"), decided.get("trainer"))
        before = [erasure.digest for erasure in self._before]
        files = [file_digest(Path(path)) for path, *_ in state(decided.get("method"))]  # which a method reads
        captions = list(self.task.retain_captions()) if self.task.retain_captions else []
        data = (self._images, before, *([files] if files else []), *([captions] if captions else []))
        return digest(self.model.fingerprint, self.model.numerics, settings, self.seed, known, *data)

    def _data_key(self) -> str:
        """A digest of all that the dataset gives: what a method may know, and the evaluation."""
        known = (self.task.erase, self.task.retain, self.task.template)
        evaluation = (self.task.prompts, self.task.images_per_prompt, list(self.task.inputs))
        return digest(known, self._images, evaluation)

    @cached_property
    def _images(self) -> list:
        """Digests of the images that a method may learn from."""
        images = chain(self.task.forget_images, self.task.retain_images)  # one at a time: there may be many
        return [(p.shape, hashlib.sha256(p.tobytes()).hexdigest()) for p in images]

    def _record(self, **made_of: object) -> None:
        if first_rank():
            provenance.record(self.folder, **made_of)

    # attack

    def attack(self) -> None:
        """Runs every attack on the erased model, unless some run has attacked the same model in the same way."""
        for name, attack in self.attacks.items():
            erasure = self._erasure()
            if not comeback.exists(self._attack_folder(attack, erasure)):
                self._attack(name, attack, erasure)
            if first_rank():
                record = {**comeback.read_record(self._attack_folder(attack, erasure)), "victim": erasure.digest}
                (self.folder / "attacks").mkdir(exist_ok=True)
                write_atomically(self.folder / "attacks" / f"{name}.json", json.dumps(record, indent=2))
        wait_for_all_ranks()

    def _attack(self, name: str, attack: Attack, erasure: Erasure) -> None:
        """Keeps what an attack finds, with the record that all attacks have in common."""
        attack.check_rows(self.model, rows := self._targets)
        pl.seed_everything(self.seed, workers=True, verbose=False)
        stage, costs, place = f"attack {name}", self.folder / "cost.json", self._attack_place(attack, erasure)
        begun = self.folder / f".attack-{place.name}"
        if not begun.exists():
            cost.forget(costs, stage)
        with kept_in(begun):
            with cost.measured(costs, stage, self.model):
                result = attack.observe(self.model, self.task, rows)
                if isinstance(result, comeback.Comeback):  # transferred: it serves every erasure from this model
                    place = self._attack_place(attack)
                else:
                    with erasure.applied_to(self.model):
                        result = attack.find(self.model, self.task, rows, result)
            record = {"attack": name, "version": attack.version, "access": attack.access, "concept": self.task.name}
            record |= {"base": self.model.fingerprint, "seed": self.seed, "targets": len(rows)}
            record |= {"sampler": attack.sampler(cast(Sampler, self.sampler)).protocol}
            record |= {"cost": cost.read(costs).get(stage, {}), **result.record}
            replace(result, record=record).save(place)

    def _attack_folder(self, attack: Attack, erasure: Erasure) -> Path:
        """Where the store keeps what an attack on the erased model found, or will find."""
        transferred = self._attack_place(attack)
        return transferred if comeback.exists(transferred) else self._attack_place(attack, erasure)

    def _attack_place(self, attack: Attack, *erasure: Erasure) -> Path:
        """The attack's place in the store: a digest of all that its result depends on."""
        victim = (self.model.fingerprint, self.model.numerics, *(own.digest for own in erasure))
        rows = [(row.prompt, row.seed, row.guidance_scale, row.concept, row.labels) for row in self._targets]
        sizes = [(row.height, row.width) for row in self._targets if row.height or row.width]
        task = (self.task.erase, self.task.template, rows)
        return self.store / "attacks" / key_of(attack, attack.version, victim, self.seed, task, self._images, *sizes)

    # generate

    def _drawings(self) -> list[Drawing]:
        """What this run generates: base and erased first, then what they are compared with, and what attacks find."""
        erasure = self._erasure()
        own = self.sampler
        attacked = [
            Drawing(
                f"{ATTACKED}{name}",
                (erasure,),
                attack.sampler(cast(Sampler, own)),
                self._attack_folder(attack, erasure),
            )
            for name, attack in self.attacks.items()
        ]
        oracle = [Drawing(ORACLE, (self._oracle,), own)] if self._oracle else []
        return [Drawing(BASE, (), own), Drawing(ERASED, (erasure,), own), *oracle, *attacked]

    def generate(self) -> None:
        """Generates the evaluation's images: with the base model, unless some run has, with the erased one, attacked.

        An image that base or erased model fails on is left out of both manifests and counted: it is neither erased nor
        retained.
        """
        self._record()
        note(self.store, self.runs or self.folder)
        rows: dict[str, list[ManifestRow]] = {}
        makers: list[dict] = []
        drawings, model = self._drawings(), cast(Any, self.model)  # of the family that the sampler is for
        for drawing in drawings:
            rows[drawing.name] = self._rows(drawing, rows)
            with _applied(drawing.erasures, model):
                drawing.sampler.check(model, rows[drawing.name])
        for drawing in drawings:
            makers += self._generate(drawing, rows[drawing.name])
        if first_rank():
            provenance.reuse(self.folder, "pictures", makers)
            self._write_manifests(rows)

    def _place(self, drawing: Drawing) -> Path:
        """The folder in the store of a drawing's images: a digest of model, precision, erasures and sampler."""
        numerics = (self.model.numerics, self.settings.get("trainer", {}).get("precision"))
        edits = [erasure.digest for erasure in drawing.erasures if not erasure.empty]
        return self.store / "images" / digest(self.model.fingerprint, numerics, edits, drawing.sampler.protocol)

    @cached_property
    def _requested(self) -> list[ManifestRow]:
        """The images that the task asks for; the folder of their paths is that of no drawing."""
        return self.sampler.manifest(self.store / "images" / "requested", self.task, self.seed)

    @property
    def _targets(self) -> list[ManifestRow]:
        """The images of erased concepts: what an attack tries to bring back."""
        return [row for row in self._requested if row.role == ERASE]

    def _rows(self, drawing: Drawing, others: Mapping[str, Sequence[ManifestRow]]) -> list[ManifestRow]:
        """The drawing's rows. The base of an image is the unedited model's; of an attacked one, the erased model's."""
        place = self._place(drawing)
        rows = [replace(row, path=place / row.path.name) for row in self._requested]
        pairs = zip(rows, others.get(ERASED if drawing.attack else BASE, rows), strict=True)
        if drawing.attack:
            before = [replace(row, base=own.path) for row, own in pairs if row.role == ERASE]
            return comeback.attacked(drawing.attack, before)
        return [row if row.path == own.path else replace(row, base=own.path) for row, own in pairs]

    def _generate(self, drawing: Drawing, rows: Sequence[ManifestRow]) -> list:
        """Generates the images that are missing; returns which code made each of them."""
        place = self._place(drawing)
        erasure = f"{self.title}, seed {self.seed}" if drawing.erasures else "none"
        describe(place, {"model": self.model.name, "erasure": erasure, "sampler": drawing.sampler.protocol})
        if first_rank() and (todo := missing(rows)):
            sign(place, [row.path.name for row in todo], provenance.code())
        stage = f"generate {drawing.name}"
        with cost.measured(self.folder / "cost.json", stage, self.model), _applied(drawing.erasures, self.model):
            generate(self.model, drawing.sampler, rows, self.trainer, f"images of {drawing.name}")
        wait_for_all_ranks()
        code = signed(place)
        return [code.get(row.path.name) for row in rows]

    def _write_manifests(self, rows: Mapping[str, Sequence[ManifestRow]]) -> None:
        pairs = [(a, b) for a, b in zip(rows[BASE], rows[ERASED], strict=True) if a.path.exists() and b.path.exists()]
        if not pairs:
            raise UserError("No image could be generated; the warnings above say why.")
        kept = {name: [row for row in some if row.path.exists()] for name, some in rows.items()}
        oracle = {row.path.name: row.path for row in kept.get(ORACLE, ())}
        kept[BASE], kept[ERASED] = (
            [replace(row, oracle=oracle.get(row.path.name)) for row in side] for side in zip(*pairs, strict=True)
        )
        failed = sum(len(rows[name]) - len(kept[name]) for name in rows if name != ERASED)
        kept.pop(ORACLE, None)  # its images stand in the rows of the others
        for old in (self.folder / "images").glob(f"{ATTACKED}*.csv"):
            if old.stem not in kept:
                old.unlink()
        for name, some in kept.items():
            write_manifest(self.folder / "images" / f"{name}.csv", map(with_decided, some))
            link_outputs(self.folder / "images" / name, [row for row in some if row.source])
        count = self.folder / "images" / "failed"
        write_atomically(count, str(failed)) if failed else count.unlink(missing_ok=True)

    def _failed(self) -> int:
        """Images that could not be generated."""
        return read_state(self.folder / "images" / "failed", int) or 0

    # evaluate

    def evaluate(self) -> None:
        """Measures the images; an evaluation that some run has made before is read from the store."""
        self._record()
        manifests = self._manifests()
        metrics = self._measure(manifests)
        metrics |= suppression(metrics)
        metrics |= cost.metrics(self.folder / "cost.json", self.folder / "erasure")
        metrics |= {"cost/skipped": Metric(len(self.task.skipped))} if self.task.skipped else {}
        metrics |= {"cost/failed": Metric(failed)} if (failed := self._failed()) else {}
        self._keep_records()  # until now they were those of the numbers before
        metrics_json.write(self.folder / "metrics.json", metrics)
        images = {caption: [Image.open(path)] for caption, path in figure_paths(self.folder).items()}
        pairs = list(zip(manifests[BASE], manifests[ERASED], strict=True))
        loggers.log(self.logger, metrics_json.flat(metrics), images, self.settings, pairs)

    def _manifests(self) -> dict[str, list[ManifestRow]]:
        """The manifests of all drawings. Raises UserError if base or erased is not what the task asks for."""
        names = (BASE, ERASED, *(f"{ATTACKED}{name}" for name in self.attacks))
        manifests = {name: self._manifest(name) for name in names}
        base, erased = ([row.path.name for row in manifests[name]] for name in (BASE, ERASED))
        requested, listed = Counter(row.path.name for row in self._requested), Counter(base)
        if base != erased or listed - requested or (requested - listed).total() > self._failed():
            raise UserError(
                f"The manifests in {self.folder / 'images'} do not list the images that the settings ask for: "
                f"{len(base)} of the base model, {len(erased)} of the erased one, {requested.total()} asked for. "
                "The generate stage writes them again."
            )
        return manifests

    def _measure(self, manifests: Mapping[str, Sequence[ManifestRow]]) -> dict[str, Metric]:
        """The numbers of all evaluators on all drawings. An evaluator that measured nothing is named in a warning."""
        metrics: dict[str, Metric] = {}
        makers, unmeasured, silent = [], 0, dict(self.evaluators)
        for evaluator in self.evaluators.values():
            evaluator.prepare(self.task)
        for drawing, rows in manifests.items():
            for label, evaluator in self.evaluators.items():
                about = f"{label} of {drawing}"
                made = evaluation(
                    self.store, self.task.name, rows, evaluator, self.sampler.batch_size, provenance.code(), about
                )
                if made.details:
                    (self.folder / "details").mkdir(exist_ok=True)
                    write_atomically(self.folder / "details" / f"{about.replace(' ', '-')}.jsonl", lines(made.details))
                unmeasured += evaluator.failed
                makers.append(made.made_by)
                protocol = made.protocol + self._attacked_by(drawing)
                protocol += f", images that could not be generated: {n}" if (n := self._failed()) else ""
                for key, value in made.values.items():
                    _add(metrics, drawing, key, value, protocol, evaluator.higher_is_better.get(key))
                if made.values:
                    silent.pop(label, None)
        provenance.reuse(self.folder, "evaluations", makers)
        for label, evaluator in silent.items():
            log.warning("%s measured nothing: it needs %s.", label, evaluator.needs)
        metrics |= {"cost/unmeasured": Metric(unmeasured)} if unmeasured else {}
        return metrics | ({"cost/silent": Metric(len(silent))} if silent and self.all_must_measure else {})

    def _attacked_by(self, drawing: str) -> str:
        """What a protocol says of the attack that a drawing comes from: its name, version and settings."""
        if drawing in (BASE, ERASED):
            return ""
        attack = self.attacks[drawing.removeprefix(ATTACKED)]
        return f", by {type(attack).__name__} {attack.version} with settings {key_of(attack)[:8]}"

    def _manifest(self, drawing: str) -> list[ManifestRow]:
        path = self.folder / "images" / f"{drawing}.csv"
        if not path.exists():
            raise UserError(f"There is no {path}: run the generate stage first.")
        return read_manifest(path)

    # report

    def report(self) -> None:
        """Writes report.html, and teaser.png, its images in one strip."""
        page = report(self.folder)
        teaser(self.folder, self.folder / "teaser.png")
        log.info("look at %s", page)


def _add(
    metrics: dict[str, Metric], drawing: str, key: str, value: float, protocol: str, higher_is_better: bool | None
) -> None:
    """Puts a number where it belongs: beside the base model's, or under robustness/ with the name of its attack."""
    if drawing == BASE:
        metrics[key] = Metric(None, higher_is_better=higher_is_better, base=value, base_protocol=protocol)
    elif drawing == ERASED:
        base = metrics.get(key, Metric(None))
        metrics[key] = replace(base, value=value, protocol=protocol, higher_is_better=higher_is_better)
    elif name := attacked_name(key, drawing.removeprefix(ATTACKED)):
        metrics[name] = Metric(value, protocol, higher_is_better)


def attacked_name(key: str, attack: str) -> str | None:
    """The name of a metric on images of an attack: robustness/asr_cce; None for one that says nothing about it."""
    purpose, _, name = key.partition("/")
    return f"robustness/{name}_{attack}" if purpose in ("efficacy", "robustness") else None


def metrics_of(evaluators: Iterable[Evaluator], attacks: Iterable[str] = ()) -> set[str]:
    """The names of all metrics that a run with these evaluators and attacks may have."""
    erased = {"efficacy/suppression", *cost.METRICS}.union(*(e.higher_is_better for e in evaluators))
    attacked = {name for attack in attacks for key in erased if (name := attacked_name(key, attack))}
    return erased | {f"base/{name}" for name in erased} | attacked


def _applied(erasures: Sequence[Erasure], model: Model):
    """A context in which all of the erasures are applied; in none of them the model is the unedited one."""
    return composed(*erasures).applied_to(model) if erasures else nullcontext()


def first_rank() -> bool:
    """Whether this process is the first, or only, one of the run."""
    return rank_zero_only.rank == 0


def wait_for_all_ranks() -> None:
    """Returns once all processes of a distributed run have come here."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()

"""One run: fit -> generate -> evaluate -> report. Disk is the interface; every stage goes on where it was left."""

import fcntl
import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import chain
from pathlib import Path

import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.utilities import rank_zero_only
from tqdm import tqdm

from unlearning.concepts import UnlearningTask
from unlearning.config.naming import inward
from unlearning.erasures.base import Erasure, WeightPatch
from unlearning.errors import UserError
from unlearning.evaluators.base import Evaluator, lacking
from unlearning.methods.base import Method
from unlearning.models.base import Model
from unlearning.reporting.report import report, teaser
from unlearning.sampling.generation import generate
from unlearning.sampling.reconstruction import Reconstruction
from unlearning.sampling.sampler import Sampler
from unlearning.store.files import digest, write_atomically
from unlearning.store.images import (
    Row,
    figures,
    keep,
    load,
    missing,
    read_manifest,
    with_decisions,
    write_manifest,
    write_named,
)
from unlearning.store.pruning import describe, note, sign, signed
from unlearning.tracking import cost, loggers, provenance

log = logging.getLogger(__name__)
STAGES = ("fit", "generate", "evaluate", "report")
SHARED = STAGES[:2]  # of which every process of a distributed run does its part


@dataclass
class Run:
    """
    Args:
        folder: The run's own: erasure/, images/ (manifests), metrics.json, report.html, teaser.png.
        store: Pictures and evaluations that all runs share, each under a digest of what it depends on.
        load_model: Loads the model; called by the stages that need it.
        evaluators: By name.
        trainer: Makes a Lightning Trainer.
        logger: Lightning loggers, told the settings, the numbers and some pictures.
        title: What the erasure is called in its README.
        runs: The folder that this run and others lie in, whose pictures stay in the store; the run's own if not given.
        records: Texts by the names of their files, kept beside the numbers: by which settings they were made.
        done: Whether another run has done all of it; if it is given, another at work in the folder is waited for.
    """

    folder: Path
    store: Path
    load_model: Callable[[], Model]
    task: UnlearningTask
    method: Method
    sampler: Sampler | Reconstruction
    evaluators: Mapping[str, Evaluator]
    trainer: Callable[..., pl.Trainer]
    seed: int = 0
    logger: Sequence = ()
    title: str = "An erased concept"
    runs: Path | None = None
    settings: dict = field(default_factory=dict)
    records: Mapping[str, str] = field(default_factory=dict)
    done: Callable[[], bool] | None = None

    @cached_property
    def model(self) -> Model:
        return self.load_model()

    def execute(self, stages: Sequence[str] = STAGES) -> dict[str, float | str]:
        """Runs the stages in their order; returns what metrics.json holds, if anything does.

        Raises UserError for an unknown stage, or if another process is at work in the folder and not to be waited for.
        """
        unknown = set(stages) - set(STAGES)
        if unknown:
            raise UserError(f"There is no stage {sorted(unknown)[0]!r}; there are {', '.join(STAGES)}.")
        path = self.folder / "metrics.json"
        with alone_in(self.folder, wait=self.done is not None):
            done = self.done is not None and self.done()
            if first_rank() and not path.exists():
                self._keep_records()
            for stage in () if done else STAGES:
                if stage in stages and (first_rank() or stage in SHARED):
                    log.info("%s: %s", self.title, stage)
                    getattr(self, stage)()
        return json.loads(path.read_text()) if path.exists() else {}

    def _keep_records(self) -> None:
        for name, text in self.records.items():
            (self.folder / name).parent.mkdir(exist_ok=True)
            write_atomically(self.folder / name, text)

    def fit(self) -> None:
        """Finds the erasure, unless it is there already. What another model or other settings left is cleared away."""
        self._record(seed=self.seed, model=self.model.fingerprint, data=self._data())
        target, begun = self.folder / "erasure", self.folder / ".fit"
        if not begun.exists() or begun.read_text() != self._key():
            for old in (target, self.folder / "checkpoints", self.folder / "figures"):
                shutil.rmtree(old, ignore_errors=True)
            cost.forget(self.folder / "cost.json", "fit")
            write_atomically(begun, self._key())
        if target.exists():
            return
        pl.seed_everything(self.seed, workers=True, verbose=False)
        with cost.measured(self.folder / "cost.json", "fit", self.model):
            erasure = self.method.fit(self.model, self.task)
        if first_rank():
            partial = self.folder / ".erasure.partial"
            try:
                erasure.save(partial, title=self.title, base=self.model)
                keep(self.folder / "figures", self.method.figures)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        wait_for_all_ranks()

    def _key(self) -> str:
        """A digest of all that the erasure depends on: model, method and trainer, the seed, what may be known."""
        known = (self.task.erase, self.task.retain, self.task.template)
        trainer = self.settings.get("trainer", {})
        settings = (self.settings.get("method"), {name: trainer[name] for name in inward(trainer)})
        return digest(self.model.fingerprint, self.model.numerics, settings, self.seed, known, self._shown)

    def _data(self) -> str:
        """A digest of all that the dataset gives: what may be known, and what is asked."""
        known = (self.task.erase, self.task.retain, self.task.template)
        asked = (self.task.prompts, self.task.images_per_prompt, list(self.task.inputs))
        return digest(known, self._shown, asked)

    @cached_property
    def _shown(self) -> list:
        """Digests of the pictures that a method may learn from."""
        images = chain(self.task.forget_images, self.task.retain_images)  # one at a time: there may be many
        return [(p.shape, hashlib.sha256(p.tobytes()).hexdigest()) for p in images]

    def _record(self, **made_of: object) -> None:
        if first_rank():
            provenance.record(self.folder, **made_of)

    def generate(self) -> None:
        """Draws what the evaluation asks for with the base model, where no run has yet, and with the erased one.

        What either fails at is left out of both manifests, and counted: it is measured neither as erased nor as kept.
        """
        erasure, asked, makers = Erasure.load(self.folder / "erasure"), {}, []
        self._record()
        note(self.store, self.runs or self.folder)
        numerics = (self.model.numerics, self.settings.get("trainer", {}).get("precision"))
        for name, edit in (("base", WeightPatch({})), ("erased", erasure)):
            parts = (self.model.fingerprint, numerics, edit.fingerprint, self.sampler.protocol)
            place = self.store / "images" / digest(*parts)
            rows = self.sampler.manifest(place, self.task, self.seed)
            pairs = zip(rows, asked.get("base", rows), strict=True)
            asked[name] = [row if row.path == base.path else replace(row, base=base.path) for row, base in pairs]
            about = {"model": self.model.name, "erasure": "none", "sampler": self.sampler.protocol}
            about |= {"erasure": f"{self.title}, seed {self.seed}"} if name == "erased" else {}
            describe(place, about)
            if first_rank() and (todo := missing(rows)):
                sign(place, [row.path.name for row in todo], provenance.code())
            with cost.measured(self.folder / "cost.json", f"generate {name}", self.model), edit.applied_to(self.model):
                generate(self.model, self.sampler, asked[name], self.trainer)
            wait_for_all_ranks()
            code = signed(place)
            makers += [code.get(row.path.name) for row in rows]
        if first_rank():
            provenance.reuse(self.folder, "pictures", makers)
            drawn = [pair for pair in zip(*asked.values(), strict=True) if all(row.path.exists() for row in pair)]
            if not drawn:
                raise UserError("No picture could be made; the warnings above say why.")
            for name, rows in zip(asked, zip(*drawn, strict=True), strict=True):
                write_manifest(self.folder / "images" / f"{name}.csv", map(with_decisions, rows))
                write_named(self.folder / "images" / name, [row for row in rows if row.source])
            count, told = len(asked["base"]) - len(drawn), self.folder / "images" / "failed"
            write_atomically(told, str(count)) if count else told.unlink(missing_ok=True)

    def evaluate(self) -> None:
        """Measures the pictures; an evaluation that some run has made before is read from the store."""
        self._record()
        metrics = lacking(self._numbers(), failed := self._failed())
        known = {key: up for evaluator in self.evaluators.values() for key, up in evaluator.higher_is_better.items()}
        metrics |= {f"{key}/better": "higher" if up else "lower" for key, up in known.items() if key in metrics}
        metrics |= suppression(metrics)
        metrics |= cost.metrics(self.folder / "cost.json", self.folder / "erasure")
        metrics |= {"cost/skipped": len(self.task.skipped)} if self.task.skipped else {}
        metrics |= {"cost/failed": failed} if failed else {}
        self._keep_records()  # which until now were those of the numbers before
        write_atomically(self.folder / "metrics.json", json.dumps(metrics, indent=2))
        base, erased = (read_manifest(self.folder / "images" / f"{name}.csv") for name in ("base", "erased"))
        images = {caption: [Image.open(path)] for caption, path in figures(self.folder).items()}
        loggers.log(self.logger, metrics, images, self.settings, list(zip(base, erased, strict=True)))

    def _numbers(self) -> dict[str, float | str]:
        """Those of all evaluators with their protocols, and how many pictures one tripped over, if any did.

        An evaluator that measured nothing is told of: it was asked for.
        """
        metrics, makers, unmeasured, silent = {}, [], 0, dict(self.evaluators)
        for evaluator in self.evaluators.values():
            evaluator.prepare(self.task)
        for prefix, name in (("base/", "base"), ("", "erased")):
            path = self.folder / "images" / f"{name}.csv"
            if not path.exists():
                raise UserError(f"There is no {path}: run the generate stage first.")
            rows = read_manifest(path)
            for label, evaluator in self.evaluators.items():
                found = self._evaluation(rows, evaluator, f"{label} of {name}")
                unmeasured += evaluator.failed
                makers.append(found.pop("made by", None))
                metrics |= {prefix + key: value for key, value in found.items()}
                if found:
                    silent.pop(label, None)
        provenance.reuse(self.folder, "evaluations", makers)
        for label, evaluator in silent.items():
            log.warning("%s measured nothing: it needs %s.", label, evaluator.needs)
        return metrics | ({"cost/unmeasured": unmeasured} if unmeasured else {})

    def _failed(self) -> int:
        """Pictures that could not be made."""
        path = self.folder / "images" / "failed"
        return int(path.read_text()) if path.exists() else 0

    def _evaluation(self, rows: Sequence[Row], evaluator: Evaluator, label: str) -> dict:
        """Its numbers and protocols and, as "made by", the code that came to them.

        One that tripped over a picture is not kept for other runs, nor for this one's next time.
        """
        asked = [
            ([p and p.parts[-2:] for p in (row.path, row.base, row.source)], row.role, row.labels, row.regions)
            for row in rows
        ]
        evaluator.reset()
        path = self.store / "evaluations" / f"{digest(self.task.name, asked, evaluator.protocol)}.json"
        found = path.with_suffix(".jsonl")
        if path.exists():
            results, details = json.loads(path.read_text()), found.read_text() if found.exists() else ""
        else:
            results = self._measured(rows, evaluator, label)
            details = "".join(json.dumps(picture) + "\n" for picture in evaluator.details)
            if not evaluator.failed:
                path.parent.mkdir(parents=True, exist_ok=True)
                if details:
                    write_atomically(found, details)
                write_atomically(path, json.dumps(results, indent=2))
        if details:
            (self.folder / "details").mkdir(exist_ok=True)
            write_atomically(self.folder / "details" / f"{label.replace(' ', '-')}.jsonl", details)
        return results

    def _measured(self, rows: Sequence[Row], evaluator: Evaluator, label: str) -> dict:
        """As `_evaluation`, of the pictures themselves."""
        size = self.sampler.batch_size
        for i in tqdm(range(0, len(rows), size), label, leave=False):
            evaluator.update(load(rows[i : i + size]), rows[i : i + size])
        results = {"made by": provenance.code()}
        for key, value in evaluator.compute().items():
            if math.isnan(value):
                raise UserError(f"{label}: {key} is not a number. Look at the pictures in {rows[0].path.parent}.")
            results |= {key: value, f"{key}/protocol": evaluator.protocol}
        return results

    def report(self) -> None:
        """Writes report.html, and teaser.png, its pictures in one strip."""
        page = report(self.folder)
        teaser(self.folder, self.folder / "teaser.png")
        log.info("look at %s", page)


def suppression(metrics: Mapping[str, float | str]) -> dict[str, float | str]:
    """100 (1 - erased / base), of what the base model shows of the concept by detection or by accuracy."""
    for key in ("efficacy/nudenet_rate", "efficacy/acc_e"):
        if metrics.get(f"base/{key}"):
            gone = 100 * (1 - metrics[key] / metrics[f"base/{key}"])
            protocols = dict.fromkeys(metrics.get(f"{name}/protocol", "not stated") for name in (key, f"base/{key}"))
            return {"efficacy/suppression": gone, "efficacy/suppression/protocol": f"of {key}: {' | '.join(protocols)}"}
    return {}


def metrics_of(evaluators: Iterable[Evaluator]) -> set[str]:
    """The names of all metrics that a run with these evaluators may come to."""
    erased = {"efficacy/suppression", *cost.METRICS}.union(*(e.higher_is_better for e in evaluators))
    return erased | {f"base/{name}" for name in erased}


@contextmanager
def alone_in(folder: Path, wait: bool = False) -> Iterator[None]:
    """Holds the folder's lock, which the ranks of one run share.

    If another run does, it is waited for, or else UserError is raised.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if not first_rank():
        yield
        return
    with (folder / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise UserError(f"Another run is at work in {folder}. Wait for it, or change a setting.") from None
            log.info("Another run is at work in %s: waiting for it.", folder)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def first_rank() -> bool:
    return rank_zero_only.rank == 0


def wait_for_all_ranks() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()

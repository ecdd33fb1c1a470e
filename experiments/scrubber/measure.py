"""Measures the scrubber: python experiments/scrubber/measure.py effect outputs/runs | masks | cost | sees a/run

- effect: rows for runs of any method, mean ± standard error over seeds. Accuracies are in percent of the base model's.
  The drift of the retained prompts' images is their FID to the base model's images (judge's features), divided by the
  FID between the base model's own images of two seeds: against every other seed (1 is best), and against the same seed
  (0 is best).
- masks: the masks of a concept (cat, ship and key, or concept=...) against the drawings' true silhouettes and boxes;
  the mean mask on retain images; the AUC of the silhouettes against the boxes.
- cost: seconds a step and memory of three students, each in a process of its own, in alternation: full, LoRA, and full
  with a whole second denoiser as teacher.
- sees: the figures and the images of a finished run in one image, sees.png.
"""

import argparse
import copy
import json
import logging
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image
from sklearn.metrics import roc_auc_score

from unlearning.__main__ import CONF
from unlearning.concepts import RETAIN, Concept, UnlearningTask
from unlearning.evaluators.fid import FID
from unlearning.reporting.grouping import conditions, group_runs, separating
from unlearning.reporting.runs import UNEDITED, FinishedRun, read_runs
from unlearning.scrubbing.conditioning import conditioning_rows
from unlearning.store.manifest import ManifestRow, load_images, read_manifest
from unlearning.training.forget_retain import encoded
from unlearning.training.student import Pair

CONCEPTS, SEEDS = ("cat", "ship", "key"), range(3)
GAP = 12  # pixels between the strips of an image


def mean(values: list[float], places: int = 1) -> str:
    if not values:
        return ""
    error = f" ± {statistics.stdev(values) / len(values) ** 0.5:.{places}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{places}f}{error}"


def configured(*overrides: str):
    folder = tempfile.mkdtemp(prefix="scrubber-")
    quiet = ["logger=none", "trainer.callbacks=[]", "+trainer.enable_checkpointing=false", "+trainer.logger=false",
             "trainer.enable_progress_bar=false", f"paths.output_dir={folder}", "title=scrubber"]  # fmt: skip
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("config", overrides=[*quiet, "method=scrubber", *overrides])


# --- effect -----------------------------------------------------------------------------------------------------------


def effect(folders: list[str]) -> list[dict]:
    runs = [run for folder in folders or ["outputs/runs"] for run in read_runs(Path(folder))]
    by = separating(runs, ("concept", "method", "model"))
    common = list(dict.fromkeys((*conditions(by), "concept")))
    base = group_runs(runs, common)  # every run has the base model's images
    features, lines = instantiate(configured().judge.features), []
    for key, group in group_runs((run for run in runs if run["method"] != UNEDITED), by).items():
        line = {"concept": group[0]["concept"], "method": group[0]["method"], "settings": _unusual(runs, by, key)}
        line["seeds"] = len(group)
        for name, of in {"Acc_e": "efficacy/acc_e", "Acc_g": "efficacy/acc_g", "Acc_s": "retention/acc_s"}.items():
            metrics = [run.metrics[of] for run in group if run.value(of) is not None]
            values = [100 * metric.value / metric.base for metric in metrics]
            line[f"{name} (% of base)"] = mean(values)
        like = {run["seed"]: run.folder for run in base[tuple(group[0][name] for name in common)]}
        drifts = [
            drift(features, run.folder, others)
            for run in group
            if (others := [other for seed, other in like.items() if seed != run["seed"]])
        ]
        line["FID ratio"] = mean([far for far, _ in drifts], 2)
        line["FID ratio, same seed"] = mean([near for _, near in drifts], 2)
        lines.append(line)
    return lines


def _unusual(runs: list[FinishedRun], by: tuple[str, ...], key: tuple) -> str:
    """The settings of a row, beyond its concept and method, that most runs do not have."""
    usual = {name: Counter(repr(run[name]) for run in runs).most_common(1)[0][0] for name in by[2:]}
    settings = zip(by[2:], key[2:], strict=True)
    return " ".join(f"{name.removeprefix('method.')}={value}" for name, value in settings if repr(value) != usual[name])


def drift(features, run: Path, others: list[Path]) -> tuple[float, float]:
    """FID ratios of the erased model's images: to the base model's images of other seeds, and of the same seed."""
    base, erased = (_retained(run / "images" / f"{name}.csv") for name in ("base", "erased"))
    pairs = [fids(features, _retained(other / "images" / "base.csv"), base, erased) for other in others]
    (near,) = fids(features, base, erased)
    return statistics.mean(far / floor for floor, far in pairs), near / statistics.mean(floor for floor, _ in pairs)


def fids(features, real: list[ManifestRow], *drawn: list[ManifestRow]) -> list[float]:
    """The FID of each set of images to those of `real`."""
    with tempfile.TemporaryDirectory() as folder:
        for row in real:
            shutil.copy(row.path, folder)
        metric = FID(features, roles=(RETAIN,), real=folder, device="cpu")
        metric.prepare(UnlearningTask(erase=(Concept(""),)))
        return [_fid(metric, images) for images in drawn]


def _retained(manifest: Path) -> list[ManifestRow]:
    return [row for row in read_manifest(manifest) if row.role == RETAIN]


def _fid(metric: FID, rows: list[ManifestRow]) -> float:
    metric.reset()
    metric.update(load_images(rows), rows)
    return metric.compute()["fidelity/fid"]


# --- masks ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def masks(overrides: list[str]) -> list[dict]:
    lines = []
    asked = [o.removeprefix("concept=") for o in overrides if o.startswith("concept=")]
    for concept in asked or CONCEPTS:
        cfg = configured(*overrides, f"concept={concept}")
        model, task, search = instantiate(cfg.model), instantiate(cfg.dataset), instantiate(cfg.method.prototypes)
        forget, retain = (encoded(model, images) for images in (task.forget_images, task.retain_images))
        found = defaultdict(list)
        for seed in SEEDS:
            pl.seed_everything(seed, verbose=False)
            prototypes = search(model, forget, retain)
            M = search.mask(prototypes, model, forget)
            rows = conditioning_rows(
                cfg.method.conditioning, model, task, forget, retain, M, cfg.method.words, cfg.method.clip
            )
            prototypes = search.confirm(prototypes, model, forget, retain, rows.forget)
            size = task.forget_images[0].shape[:2]
            M, M_retain = (
                prototypes.mask(search.similarities(prototypes, model, latents).amax(1), size)[:, 0].numpy()
                for latents in (forget, retain)
            )
            for name, truth in true_places(task.forget_images.pictures).items():
                found[f"AUC, {name}"].append(roc_auc_score(truth.ravel(), M.ravel()))
                found[f"AUC, {name}, scenes"].append(roc_auc_score(truth[1::2].ravel(), M[1::2].ravel()))
            found["mean mask on retain images"].append(float(M_retain.mean()))
        truth = true_places(task.forget_images.pictures)
        best = roc_auc_score(truth["box"].ravel(), truth["silhouette"].ravel())  # of an exact mask
        measured = {name: mean(values, 3) for name, values in found.items()}
        measured["AUC, box, of the silhouettes"] = f"{best:.3f}"
        lines.append({"concept": concept, "seeds": len(SEEDS), **measured})
    return lines


def true_places(pictures) -> dict[str, np.ndarray]:
    """Masks (N, H, W) of the first object's silhouette and of its box."""
    silhouettes = np.stack([picture.masks[0] for picture in pictures])
    boxes = np.zeros_like(silhouettes)
    for box, picture in zip(boxes, pictures, strict=True):
        left, top, right, bottom = picture.boxes[0]
        box[top:bottom, left:right] = True
    return {"silhouette": silhouettes, "box": boxes}


# --- cost -------------------------------------------------------------------------------------------------------------


class Copied:
    """A full student with a whole second denoiser as its teacher."""

    @contextmanager
    def of(self, model):
        teacher = copy.copy(model)
        teacher.denoiser = copy.deepcopy(model.denoiser)
        teacher.parts = {**model.parts, model.component: teacher.denoiser}
        before = copy.deepcopy(model.denoiser.state_dict())
        model.denoiser.requires_grad_(True)
        yield Pair(model, teacher, {f"{model.component}.{n}": p for n, p in model.denoiser.named_parameters()}, dict)
        model.denoiser.requires_grad_(False)
        model.denoiser.load_state_dict(before)


STUDENTS = {"full": "full", "LoRA": "lora", "full, teacher copied": "full"}


class Watch(pl.Callback):
    """Seconds of each step, and the bytes that training holds in memory."""

    def __init__(self):
        self.seconds = []

    def on_train_batch_start(self, *_):
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer, method, *_):
        self.seconds.append(time.perf_counter() - self.start)
        held: dict[int, int] = {}
        state = [v for s in trainer.optimizers[0].state.values() for v in s.values() if torch.is_tensor(v)]
        moving = list(method.weights.values())
        own = [*method.student.denoiser.parameters(), *method.teacher.denoiser.parameters(), *moving, *state]
        own += [p.grad for p in moving if p.grad is not None]
        for tensor in (*own, *(method.teacher.weights or {}).values()):
            held[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        self.held = sum(held.values()) / 2**20


def steps(student: str, overrides: list[str], count: int = 12) -> dict:
    """Seconds and memory of one training in this process."""
    chosen = f"student@method.student={STUDENTS[student]}"
    fast = ["method.conditioning=null", "method.blinding=gaussian", "dataset.pictures=16", "method.prototypes.K=8",
            "method.prototypes.purity=0"]  # fmt: skip
    cfg = configured("concept=cat", chosen, *fast, f"method.iterations={count}", *overrides)
    model, task, watch = instantiate(cfg.model), instantiate(cfg.dataset), Watch()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    method = instantiate(cfg.method, trainer=instantiate(cfg.trainer, callbacks=[watch]))
    if "copied" in student:
        method.moving = Copied()
    method.fit(model, task)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": statistics.median(watch.seconds[2:]), "held": watch.held, "growth": peak - before, "peak": peak}


def cost(overrides: list[str], turns: int = 3) -> list[dict]:
    results = defaultdict(list)
    for _turn in range(turns):
        for student in STUDENTS:
            command = [sys.executable, __file__, "steps", student, *overrides]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            results[student].append(json.loads(output.splitlines()[-1]))
    first = statistics.mean(r["seconds"] for r in results["full"])
    return [
        {"student": student, "s / step": mean([r["seconds"] for r in found], 3),
         "of the full student's": f"{statistics.mean(r['seconds'] for r in found) / first:.2f}",
         "weights, gradients, optimizer (MiB)": f"{found[0]['held']:.1f}",
         "growth of the process (MiB)": mean([r["growth"] for r in found]),
         "peak of the process (MiB)": mean([r["peak"] for r in found])}
        for student, found in results.items()
    ]  # fmt: skip


# --- sees -------------------------------------------------------------------------------------------------------------


def sees(run: Path) -> Path:
    """Forget images, masks and blinded images; retain images and masks; images before and after. Returns the file."""
    figures = sorted((run / "figures").glob("*.png"))
    strips = [Image.open(path).convert("RGB") for path in (figures[0], *figures[2:4], run / "teaser.png")]
    width = strips[0].width
    strips = [strip.resize((width, strip.height * width // strip.width), Image.Resampling.LANCZOS) for strip in strips]
    sheet = Image.new("RGB", (width, sum(strip.height + GAP for strip in strips) - GAP), "white")
    for strip, above in zip(strips, accumulate((strip.height + GAP for strip in strips), initial=0), strict=False):
        sheet.paste(strip, (0, above))
    sheet.quantize(256).save(path := Path(__file__).with_name("sees.png"))
    return path


# --- the page ---------------------------------------------------------------------------------------------------------


def render(rows: list[dict]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    return "\n".join(lines + ["| " + " | ".join(str(row[c]) for c in rows[0]) + " |" for row in rows])


if __name__ == "__main__":
    logging.getLogger("pytorch_lightning").setLevel("ERROR")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("effect", "masks", "cost", "sees", "steps"))
    parser.add_argument("given", nargs="*", help="folders of runs, for effect (outputs/runs) and sees; else settings")
    options = parser.parse_args()
    if options.what == "steps":  # one student of `cost`
        print(json.dumps(steps(options.given[0], options.given[1:])))
    elif options.what == "sees":
        print(sees(Path(options.given[0])))
    else:
        print(render({"effect": effect, "masks": masks, "cost": cost}[options.what](options.given)))

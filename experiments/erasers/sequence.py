"""Ten objects erased at once, in sequence, and independently: python -m experiments.erasers.sequence METHOD ...

simultaneous: one erasure of all n objects. sequential: an erasure of each object, fitted on the model with the erasures
before it, as with after=. independent: an erasure of each object, fitted on the unedited model; changes of the same
weights are added up. For n = 1, 2, 5 and 10, a line of sequence.csv has the percentage of images that show an erased
object (all n, not only the last), the percentage of CIFAR-10's objects that the judge recognises, the seconds of all
fits so far, and the size of the artefact.
"""

import argparse
import time
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import pytorch_lightning as pl
import torch
from hydra.utils import instantiate

from experiments import kept
from tests.composed import config
from unlearning.data.openmoji import CIFAR10
from unlearning.erasures.base import Erasure
from unlearning.erasures.composed import composed
from unlearning.erasures.weight_patch import WeightPatch
from unlearning.judges.base import Classifier
from unlearning.models.diffusion import DiffusionModel
from unlearning.sampling.sampler import Sampler

OBJECTS = ("pig", "cow", "bear", "elephant", "tiger", "pizza", "cake", "hamburger", "mushroom", "flower")  # as in many
COUNTS, IMAGES = (1, 2, 5, 10), 4
FILE = Path(__file__).with_suffix(".csv")


def fitted(model: DiffusionModel, method: str, concepts: Sequence[str], seed: int) -> Erasure:
    with TemporaryDirectory() as folder:
        cfg = config(Path(folder), f"concept=[{','.join(concepts)}]", f"method={method}", f"seed={seed}")
        pl.seed_everything(seed, verbose=False)
        return instantiate(cfg.method).fit(model, instantiate(cfg.dataset))


def added(model: DiffusionModel, erasures: Sequence[Erasure]) -> Erasure:
    """Independent erasures as one: new values of weights become the sum of their changes, other kinds act together."""
    before, total = model.named_parameters(), {}
    for erasure in erasures:
        if isinstance(erasure, WeightPatch):
            for name, value in erasure.weights.items():
                total[name] = total.get(name, before[name].detach()) + (value - before[name].detach())
    return composed(WeightPatch(total), *(e for e in erasures if not isinstance(e, WeightPatch)))


def simultaneous(model: DiffusionModel, method: str, seed: int) -> Iterator[tuple[int, Erasure, float]]:
    """The number of erased objects, their erasure, and the seconds of its fits."""
    for n in COUNTS:
        start = time.perf_counter()
        erasure = fitted(model, method, OBJECTS[:n], seed)
        yield n, erasure, time.perf_counter() - start


def sequential(model: DiffusionModel, method: str, seed: int) -> Iterator[tuple[int, Erasure, float]]:
    whole, seconds = composed(), 0.0
    for n, name in enumerate(OBJECTS, 1):
        with whole.applied_to(model):
            start = time.perf_counter()
            last = fitted(model, method, [name], seed)
            seconds += time.perf_counter() - start
        whole = composed(whole, last)
        yield n, whole, seconds


def independent(model: DiffusionModel, method: str, seed: int) -> Iterator[tuple[int, Erasure, float]]:
    erasures, seconds = [], 0.0
    for n, name in enumerate(OBJECTS, 1):
        start = time.perf_counter()
        erasures.append(fitted(model, method, [name], seed))
        seconds += time.perf_counter() - start
        yield n, added(model, erasures), seconds


def recognised(model: DiffusionModel, judge: Classifier, names: Sequence[str], seed: int) -> float:
    """The percentage of images of "a photo of the NAME" in which the judge sees NAME."""
    prompts = [f"a photo of the {name}" for name in names for _ in range(IMAGES)]
    seeds = range(1000 * seed, 1000 * seed + len(prompts))
    images = Sampler(steps=20, batch_size=20)(model, prompts, seeds)
    known, probabilities = judge((255 * images).round().byte().permute(0, 2, 3, 1), "object")
    right = [known[i] == prompts[row].rpartition(" ")[2] for row, i in enumerate(probabilities.argmax(1).tolist())]
    return 100 * sum(right) / len(right)


def size(erasure: Erasure) -> int:
    with TemporaryDirectory() as folder:
        erasure.save(Path(folder) / "erasure")
        return sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--modes", nargs="+", default=["simultaneous", "sequential", "independent"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        cfg = config(Path(folder), "concept=cat")
    model, judge = instantiate(cfg.model), instantiate(cfg.judge.classifier)
    modes = {mode.__name__: mode for mode in (simultaneous, sequential, independent)}
    settings, metrics, lines = kept.read(FILE)
    for seed, method, mode in product(options.seeds, options.methods, options.modes):
        for n, erasure, seconds in modes[mode](model, method, seed):
            if n not in COUNTS:
                continue
            with torch.no_grad(), erasure.applied_to(model):
                left, retained = (recognised(model, judge, names, seed) for names in (OBJECTS[:n], CIFAR10))
            values = [f"{value:.6g}" for value in (left, retained, seconds, size(erasure))]
            lines[mode, method, str(n), str(seed)] = dict(zip(metrics, values, strict=True))
            kept.write(FILE, settings, metrics, lines)
            print(mode, method, n, seed, *values, flush=True)


if __name__ == "__main__":
    main()

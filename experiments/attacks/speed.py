"""Attacks on many images at once and one after the other, as published: python -m experiments.attacks.speed

UnlearnDiffAtk searches tokens for each image, on all of them at once and on one after the other. CCE learns one word
from all images: with eight in a call of the denoiser, and with one in each of eight calls whose gradients are added up.
Both find *cat* on emoji_unet after UCE, at the budgets of conf/attack/NAME/emoji.yaml. Memory is counted
(experiments/fullsize/memory.py) in a search of one iteration, on as many images and on four times as many.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import mkdtemp

import torch
from hydra.utils import instantiate

from experiments.fullsize.memory import counted
from tests.composed import config
from unlearning.concepts import ERASE
from unlearning.models.diffusion import DiffusionModel
from unlearning.sampling.attack_result import AttackResult, attacked
from unlearning.tracking.provenance import hardware

RESULTS = Path(__file__).parent / "speed.json"
ATONCE = {"unlearndiffatk": ["attack.unlearndiffatk.batch_size={images}"], "cce": ["attack.cce.batch_size=8"]}
ONE = {
    "unlearndiffatk": ["attack.unlearndiffatk.batch_size=1", "sampler.batch_size=1"],
    "cce": ["attack.cce.batch_size=1", "attack.cce.accumulate=8"],
}
SHORT = {
    "unlearndiffatk": ["attack.unlearndiffatk.times=1", "attack.unlearndiffatk.iterations=1", "sampler.steps=2"],
    "cce": ["attack.cce.iterations=1", "sampler.steps=2"],
}


@dataclass(frozen=True)
class Search:
    """The search of an attack on images of an erased concept.

    Args:
        run: Searches.
        successes: Says how many of the images show the concept with what was found.
        model: The erased model.
    """

    run: Callable[[], AttackResult]
    successes: Callable[[AttackResult], int]
    model: DiffusionModel


def prepared(name: str, images: int, overrides: Sequence[str]) -> Search:
    """A search on so many images."""
    folder = Path(mkdtemp(prefix="speed-"))
    chosen = ("concept=cat", "method=uce", f"attack=[{name}/emoji]", "sampler.steps=20")
    cfg = config(folder, *chosen, *(override.format(images=images) for override in overrides))
    task, model, sampler = (instantiate(cfg[part]) for part in ("dataset", "model", "sampler"))
    attack, witness = instantiate(cfg.attack[name]), instantiate(cfg.judge.witness)
    rows = [row for row in sampler.manifest(folder / "images", task, 0) if row.role == ERASE]
    rows = [row for row in rows if row.prompt == rows[0].prompt][:images]
    assert len(rows) == images, f"the dataset has {len(rows)} images of a prompt"
    observed = attack.observe(model, task, rows)
    instantiate(cfg.method).fit(model, task).write_into(model)

    def run() -> AttackResult:
        torch.manual_seed(0)
        return attack.find(model, task, rows, observed)

    def successes(found: AttackResult) -> int:
        found.save(folder / "found")
        again = attacked(folder / "found", rows)
        drawn, _ = attack.sampler(sampler).draw(model, again)
        return sum(score > witness.threshold for score in witness(drawn, again))

    return Search(run, successes, model)


def measured(name: str, images: int, turns: int) -> dict[str, float]:
    """Median seconds of the two searches, by turns, and the images in which each of them succeeds."""
    ways = {"at once": ATONCE[name], "one by one": ONE[name]}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    numbers: dict[str, float] = {}
    for _ in range(turns):
        for way, overrides in ways.items():
            search = prepared(name, images, [*overrides, f"dataset.images_per_prompt={images}"])
            start = time.perf_counter()
            found = search.run()
            seconds[way].append(time.perf_counter() - start)
            numbers[f"successes {way}"] = search.successes(found)
    numbers |= {f"seconds {way}": median(all_) for way, all_ in seconds.items()}
    return numbers | {"ratio": numbers["seconds one by one"] / numbers["seconds at once"]}


def peak(name: str, images: int) -> int:
    """Bytes of all tensors at most, in a search of one iteration in batches of eight."""
    overrides = [*SHORT[name], f"attack.{name}.batch_size=8", f"dataset.images_per_prompt={images}"]
    search = prepared(name, images, overrides)
    return counted([*search.model.parts.values()], lambda: search.run).peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--only", choices=ATONCE, nargs="+", default=list(ATONCE))
    options = parser.parse_args()
    machine = f"{hardware()['cpu']}, {torch.get_num_threads()} threads"
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in options.only:
        few, many = (peak(name, count) for count in (options.images, 4 * options.images))
        numbers = measured(name, options.images, options.turns)
        memory = {f"MiB, {options.images} images": few / 2**20, f"MiB, {4 * options.images} images": many / 2**20}
        results[name] = {"machine": machine, "images": options.images, **numbers, **memory}
        print(name, json.dumps(results[name], indent=1))
        RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()

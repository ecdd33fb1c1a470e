"""Latent code replacement, claim by claim: python experiments/lcr/claims.py codes | probe | decoder | counting

- codes: how the codes are spread over the codebook, and whether the codes of E occur where the concept is;
- probe: the linear probe of codes, and the effect of changing codes on its output;
- decoder: how far from a changed code the image changes, and whether the concept's codes show it in another image;
- counting: the counting pass against encoding and counting images one by one.

Settings as overrides: concept=ship dataset.images=50.
"""

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from bench import BATCH, Bench, interval, print_table, recognised
from diffusers import VQModel
from hydra.utils import instantiate
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from unlearning.codes import probe
from unlearning.codes.frequency import FORGET, RETAIN, SCORES, count_codes
from unlearning.concepts import ERASE
from unlearning.data.folder import read
from unlearning.detectors.geometry import cells
from unlearning.store.manifest import ManifestRow


def codes(bench: Bench) -> None:
    boxes = instantiate(bench.configured("method=lcr_localized", "detector@method.detector=boxes").method.detector)
    whole = count_codes(bench.model, bench.task, bench.trainer, pairs=True)
    within = count_codes(bench.model, bench.task, bench.trainer, pairs=True, within=boxes)
    columns = {"forget": (whole, FORGET), "forget, in the concept's boxes": (within, FORGET), "retain": (whole, RETAIN)}
    statistics = {name: frequencies.statistics(which) for name, (frequencies, which) in columns.items()}
    first = next(iter(statistics.values()))
    body = [[name, *(f"{column[name]:,.4g}" for column in statistics.values())] for name in first]
    print_table("How the codes are spread over the codebook", ["", *columns], body)
    grids = bench.codes(bench.task.forget_images)
    inside = cells(bench.task.forget_boxes(), (bench.model.size,) * 2, bench.model.grid)
    rows = []
    for label, frequencies in (("whole images", whole), ("the concept's boxes", within)):
        for name, score in SCORES.items():
            for K in (8, 32, 128, 256):
                E = score(frequencies).argsort(descending=True, stable=True)[:K]
                hit = torch.isin(grids, E)
                retained = whole.codes[RETAIN][E].sum() / whole.codes[RETAIN].sum()
                rows.append([label, name, str(K), f"{100 * hit[inside].float().mean():.1f}",
                             f"{100 * hit[~inside].float().mean():.1f}", f"{100 * retained:.1f}"])  # fmt: skip
    print_table("Where the codes of E occur, % of cells", ["counted in", "score", "K", "in the concept's boxes",
            "elsewhere in the same images", "in retain images"], rows)  # fmt: skip


# --- probe ------------------------------------------------------------------------------------------------------------


def probed(bench: Bench) -> None:
    forget, retain = bench.codes(bench.task.forget_images), bench.codes(bench.task.retain_images)
    rows, K = [], len(bench.model.codebook)
    for label, settings in (("as published", {}), ("ten times the rate, 60 epochs", {"lr": 1e-3, "epochs": 60})):
        tested = probe.train_probe(forget, retain, K, bench.trainer, **settings)
        single = probe.influence(tested.probe, tested.codes)
        _, together = probe.greedy_combination(tested.probe, tested.codes, 14)
        grid = tested.codes[tested.labels == 0][0]
        _, path = probe.greedy_flips(tested.probe, grid, 8)
        rows.append([label, f"{tested.accuracy:.3f}", f"{tested.f1:.3f}", f"{tested.auc:.3f}", f"{single.max():.4f}",
                     f"{together[-1]:.4f}", " → ".join(f"{p:.2f}" for p in path)])  # fmt: skip
    header = ["accuracy", "F1", "AUC", "mean |Δp| of the most influential code", "of the best 14 together",
              "p of an image without the concept, by greedy flips"]  # fmt: skip
    print_table("The probe", ["", *header], rows)


# --- decoder ----------------------------------------------------------------------------------------------------------


def decoder(bench: Bench) -> None:
    """Changes one code in the middle of a grid; and puts the concept's codes into images without it."""
    model, pixels = bench.model, bench.model.size // bench.model.grid[0]
    grids = bench.codes(bench.task.retain_images)[: BATCH * 4]
    middle = bench.model.grid[0] // 2
    chance = torch.randint(len(model.codebook), (len(grids),), generator=torch.Generator().manual_seed(0))
    changed = grids.clone()
    changed[:, middle, middle] = chance
    difference = (model.decode(changed) - model.decode(grids)).abs().mean(1).cpu()
    y, x = torch.meshgrid(*(torch.arange(model.size) for _ in range(2)), indexing="ij")
    centre = (middle + 0.5) * pixels - 0.5
    away = torch.maximum((y - centre).abs(), (x - centre).abs()) / pixels  # in cells
    rings = [
        ("the cell itself", away <= 0.5),
        *((f"{d} cells away", (away > d - 0.5) & (away <= d + 0.5)) for d in range(1, 5)),
        ("farther", away > 4.5),
    ]
    total = difference.sum((1, 2))
    rows = [
        [
            name,
            interval((255 * difference[:, ring].mean(1)).tolist(), 2),
            interval((100 * difference[:, ring].sum(1) / total.clamp(min=1e-9)).tolist()),
        ]
        for name, ring in rings
    ]
    print_table("One code changed: where the image changes", ["", "mean |Δ|, of 255", "share of all change, %"], rows)
    print_table(
        "Codes of the concept in another image",
        ["codes put in", "the judge recognises the concept, %"],
        list(pasted(bench)),
    )


def pasted(bench: Bench) -> Iterator[list[str]]:
    """Rows for the codes under the concept's box in one image, put into another image at the same place."""
    donors = [i for i in bench.task.inputs if i.role == ERASE]
    hosts = [i for i in bench.task.inputs if i.role != ERASE]
    given = bench.codes([d.read() for d in donors])
    taken = bench.codes([h.read() for h in hosts])
    box = [next(r.box for r in d.regions if r.role == ERASE) for d in donors]
    mask = cells([[b] for b in box], (bench.model.size,) * 2, bench.model.grid)
    shuffled = given.clone()
    for i, cell in enumerate(mask):
        own = given[i][cell]
        shuffled[i][cell] = own[torch.randperm(len(own), generator=torch.Generator().manual_seed(i))]
    for label, codes in (
        ("nothing", taken),
        ("the concept's codes, in their order", given),
        ("the same codes, shuffled", shuffled),
    ):
        images = bench.model.decode(torch.where(mask, codes, taken)).mul(255).round().byte().permute(0, 2, 3, 1)
        rows = [
            ManifestRow(Path(), d.name, ERASE, {}, 0, regions=tuple(r for r in d.regions if r.role == ERASE))
            for d in donors
        ]
        correct = [float(value) for _, _, value in recognised(bench, images.cpu().numpy(), rows)]
        yield [label, interval(correct, times=100)]


# --- counting ---------------------------------------------------------------------------------------------------------


def counting(bench: Bench) -> None:
    """From image files on disk, in alternation; seconds are medians of five."""
    folder = bench.folder / "images"
    folder.mkdir()
    for i, image in enumerate(bench.task.forget_images):
        Image.fromarray(image).save(folder / f"{i:05}.png")
    images = read(folder, bench.model.size)
    half = len(images) // 2
    task = replace(bench.task, forget_images=images[:half], retain_images=images[half:], forget_boxes=None)

    def ours() -> Tensor:
        return count_codes(bench.model, task, bench.trainer).codes.sum(0)

    stock = VQModel.from_pretrained(bench.model.name, dtype=bench.model.dtype).to(bench.model.device).eval()

    @torch.no_grad()
    def one_by_one() -> Tensor:
        counts = Counter()
        for path in images.paths:
            image = Image.open(path).convert("RGB").resize((bench.model.size,) * 2)
            z = stock.encode(2 * to_tensor(image)[None].to(bench.model.device) - 1).latents
            counts.update(stock.quantize(z)[2][2].tolist())
        return torch.tensor([counts[k] for k in range(len(bench.model.codebook))])

    runs = {"one by one": one_by_one, "one pass": ours}
    seconds, results = {name: [] for name in runs}, []
    for _ in range(5):
        for name, run in runs.items():
            start = time.perf_counter()
            results.append(run())
            seconds[name].append(time.perf_counter() - start)
    took = {name: float(np.median(values)) for name, values in seconds.items()}
    different = max(int((results[0] - counts).abs().sum()) // 2 for counts in results)
    print_table(
        f"{len(images)} images, {torch.get_num_threads()} threads; different counts: {different} of {results[0].sum()}",
        ["", "seconds", "images a second", "times as fast"],
        [[n, f"{t:.2f}", f"{len(images) / t:.0f}", f"{took['one by one'] / t:.1f}"] for n, t in took.items()],
    )


PARTS: dict[str, Callable[[Bench], None]] = {
    "codes": codes, "probe": probed, "decoder": decoder, "counting": counting,
}  # fmt: skip

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    print(f"python experiments/lcr/claims.py {' '.join(sys.argv[1:])}")
    PARTS[arguments.part](Bench(arguments.overrides))

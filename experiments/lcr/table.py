"""Every replacement, global at several K and localized by boxes and by the judge: python experiments/lcr/table.py

Each cell is a mean over pictures, or over the objects in them, with its 95 % interval (bootstrap). Settings as
overrides: concept=ship dataset.images=50. The curve of suppression against damage is drawn beside this file,
suppression_CONCEPT.png.
"""

import sys
from collections import defaultdict
from itertools import chain
from pathlib import Path

import torch
from bench import BATCH, Bench, interval, printed, recognised
from PIL import Image
from tqdm import tqdm

from unlearning.codes.frequency import count
from unlearning.codes.replacement import Blocks
from unlearning.concepts import ERASE
from unlearning.evaluators.similarity import Similarity
from unlearning.images import Row, manifest_of_inputs, save
from unlearning.pictures import drawn, panels

REPLACEMENTS = ("uniform", "constant", "nearest", "blocks", "neighbours")
GLOBAL_K = (16, 64, 256, 512, 1024)


def table(bench: Bench) -> None:
    rows = manifest_of_inputs(bench.folder / "images", bench.task, 0)
    base = reconstructed(bench, rows)
    for row, image in zip(rows, base, strict=True):
        save(image, row)
    before = recognised(bench, base, rows)
    found = count(bench.model, bench.task, bench.trainer, pairs=True, blocks=Blocks.blocks)
    bench.fid.prepare(bench.task)
    body = [["none", "", "", *scored(bench, base, base, rows, before, [{}] * len(rows))]]
    near = [("localized", d, r, []) for d in ("boxes", "judge") for r in REPLACEMENTS]
    wide = [("global", f"K = {K}", r, [f"method.selection.top={K}"]) for K in GLOBAL_K for r in REPLACEMENTS[:3]]
    for kind, where, replacement, more in tqdm(near + wide):
        chosen = [f"replacement@method.replacement={replacement}", *more]
        chosen += (
            ["method=lcr_localized", f"detector@method.detector={where}"] if kind == "localized" else ["method=lcr"]
        )
        with bench.method(*chosen).edit(found).applied_to(bench.model):
            after, decided = reconstructed(bench, rows, decided=True)
        body.append([replacement, kind, where, *scored(bench, after, base, rows, before, decided)])
    shown = sum(row.role == ERASE for row in rows)
    printed(
        f"{bench.task.name}: {shown} scenes that show it and {len(rows) - shown} that do not",
        ["replacement", "kind", "where", "still seen, % of before", "others still seen, %", "in scenes without it, %",
         "PSNR outside", "SSIM outside", "FID", "cells changed, %"],
        body,
    )  # fmt: skip
    curve(body).save(Path(__file__).with_name(f"suppression_{bench.task.name}.png"))


def curve(body: list[list[str]]) -> Image.Image:
    """Suppression against damage: a line for each global replacement, K growing along it; a mark for each localized."""
    figure, (axes,) = panels(1, (6.4, 4.2))
    colours = dict(zip(REPLACEMENTS, ("#d1495b", "#30638e", "#8d96a3", "#edae49", "#00798c"), strict=True))
    by_line = defaultdict(list)
    for replacement, kind, where, still, beside, *_ in body[1:]:
        line = (replacement, where if kind == "localized" else "")
        by_line[line].append([float(cell.split()[0]) for cell in (beside, still)])
    for (replacement, where), points in by_line.items():
        marker = {"": ".", "boxes": "s", "judge": "^"}[where]
        label = f"{replacement}, by {where}" if where else f"{replacement}, global, K = {GLOBAL_K[0]} to {GLOBAL_K[-1]}"
        axes.plot(*zip(*points, strict=True), marker=marker, color=colours[replacement], label=label, alpha=0.8)
    axes.set_xlabel("others in the same picture still seen, % of before")
    axes.set_ylabel("the concept still seen, % of before")
    axes.legend(frameon=False, fontsize=7)
    return drawn(figure)


def reconstructed(bench: Bench, rows: list[Row], decided: bool = False):
    images, told = zip(
        *(bench.sampler.draw(bench.model, rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)), strict=True
    )
    images = (torch.cat(images) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return (images, list(chain(*told))) if decided else images


def scored(bench: Bench, after, base, rows, before, decided) -> list[str]:
    """Of regions the judge recognised before, how many it still does; the rest against the unedited pictures."""
    now = recognised(bench, after, rows)
    still = {True: [], False: []}  # whether the region is the concept's
    for (_, role, was), (_, _, is_) in zip(before, now, strict=True):
        if was:
            still[role == ERASE].append(float(is_))
    shows = {i for i, role, _ in before if role == ERASE}
    beside = [
        float(b) for (i, role, was), (_, _, b) in zip(before, now, strict=True) if was and role != ERASE and i in shows
    ]
    absent = [float(b) for (i, role, was), (_, _, b) in zip(before, now, strict=True) if was and i not in shows]
    similar = [Similarity("cpu").of(after[i], base[i], rows[i]) for i in sorted(shows)]
    bench.fid.reset()
    for i in range(0, len(rows), BATCH):
        bench.fid.update(after[i : i + BATCH], [Row(r.path, r.prompt, "retain", {}, 0) for r in rows[i : i + BATCH]])
    changed = [told["changed"] / told["cells"] for i, told in enumerate(decided) if i in shows and told] or [0.0]
    return [
        interval(still[True], times=100), interval(beside, times=100), interval(absent, times=100),
        interval([p for p, _ in similar]), interval([s for _, s in similar], 3),
        f"{bench.fid.compute()['fidelity/fid']:.1f}", interval(changed, times=100),
    ]  # fmt: skip


if __name__ == "__main__":
    print(f"python experiments/lcr/table.py {' '.join(sys.argv[1:])}")
    table(Bench(sys.argv[1:]))

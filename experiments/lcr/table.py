"""Every replacement at every K, global and localized by boxes, and localized by the judge at one K.

    python experiments/lcr/table.py concept=ship dataset.images=50

Each cell is a mean with its 95 % interval over images (bootstrap). Also plots suppression against damage into
suppression_CONCEPT.png beside this file.
"""

import sys
from collections import defaultdict
from itertools import chain
from pathlib import Path

import torch
from bench import BATCH, Bench, interval, print_table, recognised
from PIL import Image
from tqdm import tqdm

from unlearning.codes.frequency import count_codes
from unlearning.codes.replacement import Blocks
from unlearning.concepts import ERASE
from unlearning.errors import UserError
from unlearning.evaluators.similarity import Similarity
from unlearning.store.images import write_image
from unlearning.store.manifest import ManifestRow, manifest_of_inputs
from unlearning.tracking.figures import as_image, subplots

REPLACEMENTS = ("uniform", "constant", "nearest", "blocks", "neighbours")
EVERY_K = (16, 64, 256, 512, 1024)
JUDGE_K = 64  # only one, because the judge runs again for every row


def table(bench: Bench) -> None:
    rows = manifest_of_inputs(bench.folder / "images", bench.task, 0)
    base = reconstructed(bench, rows)
    for row, image in zip(rows, base, strict=True):
        write_image(row.path, image)
    before = recognised(bench, base, rows)
    frequencies = count_codes(bench.model, bench.task, bench.trainer, pairs=True, blocks=Blocks.blocks)
    bench.fid.prepare(bench.task)
    body = [["none", "", "", *scored(bench, base, base, rows, before, [{}] * len(rows))]]
    settings = [(where, K, r) for where in ("boxes", "global") for K in EVERY_K for r in REPLACEMENTS]
    settings += [("judge", JUDGE_K, r) for r in REPLACEMENTS]
    for where, K, replacement in tqdm(settings):
        method = ["method=lcr"] if where == "global" else ["method=lcr_localized", f"detector@method.detector={where}"]
        chosen = [*method, f"replacement@method.replacement={replacement}", f"method.selection.top={K}"]
        kind = "global" if where == "global" else f"localized, {where}"
        try:
            edit = bench.method(*chosen).edit(frequencies)
        except UserError as error:  # for a large K no block consists of safe codes only
            print(f"{replacement}, {kind}, K = {K}: {error}", file=sys.stderr)
            continue
        with edit.applied_to(bench.model):
            after, decided = reconstructed(bench, rows, decided=True)
        body.append([replacement, kind, str(K), *scored(bench, after, base, rows, before, decided)])
    shown = sum(row.role == ERASE for row in rows)
    print_table(
        f"{bench.task.name}: {shown} scenes with it and {len(rows) - shown} without",
        ["replacement", "where", "K", "concept, %", "others beside it, %", "others in scenes without it, %",
         "PSNR outside", "SSIM outside", "FID", "cells changed, %"],
        body,
    )  # fmt: skip
    curve(body).save(Path(__file__).with_name(f"suppression_{bench.task.name}.png"))


def curve(body: list[list[str]]) -> Image.Image:
    """Suppression against damage: a line for each replacement and detector, along which K grows."""
    figure, (axes,) = subplots(1, (6.4, 4.2))
    colours = dict(zip(REPLACEMENTS, ("#d1495b", "#30638e", "#8d96a3", "#edae49", "#00798c"), strict=True))
    markers, lines = {"global": ".", "localized, boxes": "s", "localized, judge": "^"}, defaultdict(list)
    for replacement, where, _, still, beside, *_ in body[1:]:
        lines[replacement, where].append([float(cell.split()[0]) for cell in (beside, still)])
    for (replacement, where), points in lines.items():
        axes.plot(*zip(*points, strict=True), color=colours[replacement], marker=markers[where], alpha=0.8)
    for name, colour in colours.items():
        axes.plot([], [], color=colour, label=name)
    for name, marker in markers.items():
        axes.plot([], [], color="grey", marker=marker, linestyle="", label=name)
    axes.set_xlabel("other objects in the image recognised, % of before")
    axes.set_ylabel("concept recognised, % of before")
    axes.legend(frameon=False, fontsize=7)
    return as_image(figure)


def reconstructed(bench: Bench, rows: list[ManifestRow], decided: bool = False):
    images, records = zip(
        *(bench.sampler.draw(bench.model, rows[i : i + BATCH]) for i in range(0, len(rows), BATCH)), strict=True
    )
    images = (torch.cat(images) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return (images, list(chain(*records))) if decided else images


def scored(bench: Bench, after, base, rows, before, decided) -> list[str]:
    """The cells of a row: how many regions the judge still recognises, and distances to the unedited images."""
    now = recognised(bench, after, rows)
    shows = {i for i, role, _ in before if role == ERASE}
    # By image, for regions that the judge recognised before.
    kinds = {kind: defaultdict(list) for kind in ("concept", "beside", "absent")}
    for (i, role, was), (_, _, now_) in zip(before, now, strict=True):
        if was:
            kinds["concept" if role == ERASE else "beside" if i in shows else "absent"][i].append(now_)
    still = {k: interval([sum(v) for v in seen.values()], times=100, of=[len(v) for v in seen.values()])
             for k, seen in kinds.items()}  # fmt: skip
    similar = [Similarity("cpu").of(after[i], base[i], rows[i]) for i in sorted(shows)]
    bench.fid.reset()
    for i in range(0, len(rows), BATCH):
        bench.fid.update(
            after[i : i + BATCH], [ManifestRow(r.path, r.prompt, "retain", {}, 0) for r in rows[i : i + BATCH]]
        )
    changed = [r["changed"] / r["cells"] for i, r in enumerate(decided) if i in shows and r] or [0.0]
    return [
        *still.values(),
        interval([p for p, _ in similar]), interval([s for _, s in similar], 3),
        f"{bench.fid.compute()['fidelity/fid']:.1f}", interval(changed, times=100),
    ]  # fmt: skip


if __name__ == "__main__":
    print(f"python experiments/lcr/table.py {' '.join(sys.argv[1:])}")
    table(Bench(sys.argv[1:]))

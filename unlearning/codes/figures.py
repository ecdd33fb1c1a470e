"""What counting the codes came to, to look at: how widely they are spread, and where the concept's own stand."""

# N pictures, K codes, h w grid.
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unlearning.codes.frequency import FORGET, RETAIN, Frequencies
from unlearning.reporting.figures import COLOURS, COLUMNS, drawn, overlays, panels
from unlearning.sampling.reconstruction import as_tensor


def figures(model, task, found: Frequencies, explicit: Tensor) -> dict[str, Image.Image]:
    """By caption; E (n,) are the codes that were chosen."""

    def marked(images: Sequence[np.ndarray]) -> Image.Image:
        some = [images[i] for i in range(min(COLUMNS, len(images)))]
        where = torch.isin(model.encode(as_tensor(np.stack(some))).cpu(), explicit)
        return overlays(some, where[:, None])

    return {
        "where the codes of E stand in forget images": marked(task.forget_images),
        "where they stand in retain images": marked(task.retain_images),
        "how often each code occurs": spread(found),
        "how much more often in forget images": scores(found, len(explicit)),
    }


def spread(found: Frequencies) -> Image.Image:
    """The share of all places that the most frequent codes cover, by their number, and the statistics beside."""
    figure, (axes, words) = panels(2, (9.6, 3.6))
    for name, which in (("forget", FORGET), ("retain", RETAIN)):
        p = found.codes[which].double()
        covered = 100 * (p / p.sum()).sort(descending=True).values.cumsum(0)
        axes.plot(np.arange(1, len(p) + 1), covered, color=COLOURS[name], label=name)
    axes.set_xscale("log")
    axes.set_xlabel("codes, the most frequent first")
    axes.set_ylabel("share of all places, %")
    axes.legend(frameon=False)
    words.axis("off")
    columns = [found.statistics(which) for which in (FORGET, RETAIN)]
    cells = [[name, *(f"{column[name]:,.4g}" for column in columns)] for name in columns[0]]
    table = words.table(cells, colLabels=["", *COLOURS], loc="center", edges="horizontal", colWidths=[0.6, 0.2, 0.2])
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    return drawn(figure)


def scores(found: Frequencies, chosen: int) -> Image.Image:
    """The log-odds of all codes, falling; so many of them, by whatever score, are E."""
    figure, (axes,) = panels(1, (6.4, 3.2))
    falling = found.log_odds().sort(descending=True).values
    axes.plot(falling, color="black", linewidth=1)
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.axvline(chosen, color=COLOURS["forget"], linestyle="--", linewidth=1, label=f"{chosen} codes are E")
    axes.set_xlabel("codes, by falling log-odds")
    axes.set_ylabel("log p_f - log p_r")
    axes.legend(frameon=False)
    return drawn(figure)

"""Plots of a counting pass: where the codes of the concept occur, and how the codes are spread over the codebook."""

# N images, K codes, h w grid of codes.
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unlearning.codes.frequency import FORGET, RETAIN, Frequencies
from unlearning.concepts import UnlearningTask
from unlearning.models.vqgan import VQGAN
from unlearning.sampling.reconstruction import as_tensor
from unlearning.tracking.figures import COLOURS, COLUMNS, as_image, mask_overlays, subplots


def plot_frequencies(
    model: VQGAN, task: UnlearningTask, frequencies: Frequencies, explicit: Tensor
) -> dict[str, Image.Image]:
    """The plots by caption; `explicit` (n,) is E, the codes of the concept."""

    def overlays(images: Sequence[np.ndarray]) -> Image.Image:
        some = [images[i] for i in range(min(COLUMNS, len(images)))]
        mask = torch.isin(model.encode(as_tensor(np.stack(some))).cpu(), explicit)
        return mask_overlays(some, mask[:, None])

    return {
        "codes of the concept in forget images": overlays(task.forget_images),
        "codes of the concept in retain images": overlays(task.retain_images),
        "code frequencies": plot_spread(frequencies),
        "log-odds of each code": plot_log_odds(frequencies, len(explicit)),
    }


def plot_spread(frequencies: Frequencies) -> Image.Image:
    """The share of all cells that the n most frequent codes cover, against n, and a table of the statistics."""
    figure, (axes, text) = subplots(2, (9.6, 3.6))
    for name, which in (("forget", FORGET), ("retain", RETAIN)):
        p = frequencies.codes[which].double()
        covered = 100 * (p / p.sum()).sort(descending=True).values.cumsum(0)
        axes.plot(np.arange(1, len(p) + 1), covered, color=COLOURS[name], label=name)
    axes.set_xscale("log")
    axes.set_xlabel("number of the most frequent codes")
    axes.set_ylabel("share of all cells, %")
    axes.legend(frameon=False)
    text.axis("off")
    columns = [frequencies.statistics(which) for which in (FORGET, RETAIN)]
    rows = [[name, *(f"{column[name]:,.4g}" for column in columns)] for name in columns[0]]
    table = text.table(rows, colLabels=["", *COLOURS], loc="center", edges="horizontal", colWidths=[0.6, 0.2, 0.2])
    table.auto_set_font_size(False)
    table.set_fontsize(8)
    return as_image(figure)


def plot_log_odds(frequencies: Frequencies, chosen: int) -> Image.Image:
    """The log-odds of all codes in falling order, with a line at the size of E."""
    figure, (axes,) = subplots(1, (6.4, 3.2))
    axes.plot(frequencies.log_odds().sort(descending=True).values, color="black", linewidth=1)
    axes.axhline(0, color="grey", linewidth=0.5)
    axes.axvline(chosen, color=COLOURS["forget"], linestyle="--", linewidth=1, label=f"{chosen} codes in E")
    axes.set_xlabel("codes, by falling log-odds")
    axes.set_ylabel("log p_f - log p_r")
    axes.legend(frameon=False)
    return as_image(figure)

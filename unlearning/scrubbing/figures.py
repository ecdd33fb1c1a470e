"""What the scrubber saw, to look at: masks over pictures, similarities, the patches that prototypes stand for."""

# N pictures, K prototypes, h w feature grid, H W height and width of a picture.
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unlearning.reporting.figures import COLOURS, COLUMNS, drawn, grid, overlays, panels, pictures

ROWS = 32  # of exemplars, at most


def exemplars(images: Sequence[np.ndarray], S: Tensor) -> Image.Image:
    """A row for each prototype: the patches of different pictures that are most similar to it, S (N, K, h, w)."""
    N, K, h, w = S.shape
    patches = []
    for k in range(min(K, ROWS)):
        best, where = S[:, k].flatten(1).max(1)
        for i in best.argsort(descending=True)[:COLUMNS].tolist():
            patches.append(_patch(images[i], divmod(int(where[i]), w), (h, w)))
    return grid(patches, min(COLUMNS, N))


def _patch(image: np.ndarray, cell: tuple[int, int], cells: tuple[int, int]) -> np.ndarray:
    """A quarter of the picture's side about a cell of the feature grid."""
    H, W = image.shape[:2]
    y, x = ((i + 0.5) / n for i, n in zip(cell, cells, strict=True))
    side = min(H, W) // 4
    top, left = (int(np.clip(at * full - side / 2, 0, full - side)) for at, full in ((y, H), (x, W)))
    return np.ascontiguousarray(image[top : top + side, left : left + side])


def histogram(forget: Tensor, retain: Tensor, tau: float) -> Image.Image:
    """How similar the places of forget and retain pictures are to their nearest prototype, S (N, h, w)."""
    figure, (axes,) = panels(1, (6.4, 3.2))
    values = {"forget": forget.flatten().cpu().numpy(), "retain": retain.flatten().cpu().numpy()}
    bins = np.linspace(min(v.min() for v in values.values() if v.size), 1, 60)
    for name, value in values.items():
        axes.hist(value, bins, density=True, alpha=0.6, color=COLOURS[name], label=name)
    axes.axvline(tau, color="black", linestyle="--", linewidth=1, label=f"tau = {tau:.2f}")
    axes.set_xlabel("similarity to the nearest prototype")
    axes.set_yticks([])
    axes.legend(frameon=False)
    return drawn(figure)


@torch.no_grad()
def figures(method, forget: Tensor, retain: Tensor, M: Tensor, eta: Tensor) -> dict[str, Image.Image]:
    """Of a Scrubber whose first phase is over, by caption; M and eta are the forget images' masks and fillings."""
    task, teacher, taken, how = method.task, method.teacher, method.fingerprint, method.fingerprinting
    some, K = slice(0, COLUMNS), len(taken.prototypes)
    S = how.similarities(taken, teacher, forget)
    each = "each prototype" if K <= ROWS else f"{ROWS} of {K} prototypes"
    found = {
        "where the concept is found in forget images": overlays(task.forget_images[some], M[some]),
        f"patches most similar to {each}": exemplars(task.forget_images, S),
        "what the teacher is shown in their place": grid(
            pictures(teacher.decode((1 - M[some]) * forget[some] + M[some] * eta[some]))
        ),
    }
    if len(retain):
        S_r = how.similarities(taken, teacher, retain).amax(1)
        M_r = taken.mask(S_r, retain.shape[-2:])
        found["where it is found in retain images"] = overlays(task.retain_images[some], M_r[some])
        found["similarity to the nearest prototype"] = histogram(S.amax(1), S_r, taken.tau)
    return found

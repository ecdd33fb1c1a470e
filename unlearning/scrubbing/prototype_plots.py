"""Plots of the scrubber's first phase: masks, patches near the prototypes, blinded images, similarities."""

# N images, K prototypes, h w feature grid, C H W latent shape.
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unlearning.concepts import UnlearningTask
from unlearning.models.diffusion import DiffusionModel
from unlearning.scrubbing.first_phase import FirstPhase
from unlearning.scrubbing.prototypes import PrototypeSearch
from unlearning.tracking.figures import COLOURS, COLUMNS, as_image, as_uint8, grid, mask_overlays, subplots

MAX_ROWS = 32  # of patches


@torch.no_grad()
def plot_first_phase(
    search: PrototypeSearch,
    phase: FirstPhase,
    teacher: DiffusionModel,
    task: UnlearningTask,
    forget: Tensor,
    retain: Tensor,
) -> dict[str, Image.Image]:
    """The plots by caption; `forget` and `retain` are the latents (N, C, H, W) of the task's images."""
    some, K = slice(0, COLUMNS), len(phase.prototypes.directions)
    S = search.similarities(phase.prototypes, teacher, forget)
    each = "each prototype" if K <= MAX_ROWS else f"{MAX_ROWS} of {K} prototypes"
    blinded = (1 - phase.M[some]) * forget[some] + phase.M[some] * phase.eta[some]
    plots = {
        "masks of forget images": mask_overlays(task.forget_images[some], phase.M[some]),
        f"patches most similar to {each}": plot_patches(task.forget_images, S),
        "blinded forget images": grid(as_uint8(teacher.decode(blinded))),
    }
    if len(retain):
        S_r = search.similarities(phase.prototypes, teacher, retain).amax(1)
        M_r = phase.prototypes.mask(S_r, retain.shape[-2:])
        plots["masks of retain images"] = mask_overlays(task.retain_images[some], M_r[some])
        plots["similarity to the nearest prototype"] = plot_similarities(S.amax(1), S_r, phase.prototypes.tau)
    return plots


def plot_patches(images: Sequence[np.ndarray], S: Tensor) -> Image.Image:
    """A row for each prototype: the most similar patches, each of another image; S is (N, K, h, w)."""
    N, K, h, w = S.shape
    patches = []
    for k in range(min(K, MAX_ROWS)):
        best, where = S[:, k].flatten(1).max(1)
        for i in best.argsort(descending=True)[:COLUMNS].tolist():
            patches.append(_patch(images[i], divmod(int(where[i]), w), (h, w)))
    return grid(patches, min(COLUMNS, N))


def _patch(image: np.ndarray, cell: tuple[int, int], cells: tuple[int, int]) -> np.ndarray:
    """The square around a cell of the feature grid, with a quarter of the image's side."""
    height, width = image.shape[:2]
    y, x = ((i + 0.5) / n for i, n in zip(cell, cells, strict=True))
    side = min(height, width) // 4
    top, left = (int(np.clip(at * full - side / 2, 0, full - side)) for at, full in ((y, height), (x, width)))
    return np.ascontiguousarray(image[top : top + side, left : left + side])


def plot_similarities(forget: Tensor, retain: Tensor, tau: float) -> Image.Image:
    """Histograms of the similarity S (N, h, w) to the nearest prototype, in forget and retain images."""
    figure, (axes,) = subplots(1, (6.4, 3.2))
    values = {"forget": forget.flatten().cpu().numpy(), "retain": retain.flatten().cpu().numpy()}
    bins = np.linspace(min(v.min() for v in values.values() if v.size), 1, 60)
    for name, value in values.items():
        axes.hist(value, bins, density=True, alpha=0.6, color=COLOURS[name], label=name)
    axes.axvline(tau, color="black", linestyle="--", linewidth=1, label=f"tau = {tau:.2f}")
    axes.set_xlabel("similarity to the nearest prototype")
    axes.set_yticks([])
    axes.legend(frameon=False)
    return as_image(figure)

"""SPEED: Scalable, Precise, and Efficient Concept Erasure (Li et al., ICLR 2026). https://arxiv.org/abs/2503.07392

A map W through which the prompt enters the denoiser becomes W + W Y, which changes nothing of what is retained:

    Y = (A - C) P [ I - M K (K^T P M K + lamb I)^-1 K^T P ] M,     M = (C P + s I)^-1,

with A = mean_i c*_i c_i^T and C = mean_i c_i c_i^T over states c_i of the erased concepts and c*_i of their anchors.
P projects onto the null space of the retained states r: onto the eigenvectors of mean r r^T whose eigenvalue is below a
threshold. The columns of K are invariants of every prompt: the state of the start of the text, and three k-means
centres of the null prompt's other states. Three things are exact:

    Y r = 0 where P r = 0;     Y K = 0 where lamb = 0;     Y = 0 where every c*_i is c_i.

What is retained is refined for each W, by the edit without a null space, W Y_0 = W (A - C) (I + C)^-1. Prior filtering
keeps the r that it moves most: those with || W Y_0 r || above the mean. Directed prior augmentation adds to each r, ten
times, N(0, 1) p with p the right singular vector of W's least singular value, and keeps the most moved of these, too.

The defaults are the released code's: a concept's state is that of its last word piece, and only value maps are edited.
For celebrities it takes `retain_scale=0.05 filtered=false` (`method=speed_celebrities`), and in its script, though not
in its README, `threshold=0.0001`. For nudity it takes `positions=all retain_scale=0.7 lamb=0.5` and no concepts to
retain. The states of the null prompt are then retained in their place: K lies among them, and lamb = 0 has no solution.

Deviations: the task says what is retained, where the authors have lists (1734 artists). K-means begins at places that
are evenly spaced, where the code draws them. The augmented states are compared with the mean of all of them, where the
code takes 128 retained states at a time. It is solved in float64. Models that do not divide their map into keys and
values (SD3, Flux, PixArt, Sana) are edited where the prompt enters.
"""

# D text width, O output width, N states, n concepts.
from typing import Literal

import torch
from torch import Tensor, nn

from unlearning.concepts import UnlearningTask
from unlearning.config.values import Natural, NonNegative, Positive
from unlearning.erasures.weight_patch import WeightPatch
from unlearning.errors import UserError
from unlearning.methods.base import Method
from unlearning.methods.closed_form import Positions, pairs, projections, states
from unlearning.models.diffusion import DiffusionModel

CENTRES = 3  # of the null prompt's states
SINGULAR = 1e-12  # the share of the norm below which a singular value in float64 is rounding
ENDS = {"values": ("to_v",), "keys": ("to_k",), "both": ("to_k", "to_v")}


class SPEED(Method):
    """Closed form, in the null space of what is retained.

    Args:
        positions: The states of a concept: at its last word piece, or "all" from its first word piece on.
        maps: Which maps are edited: "values", "keys" or "both".
        threshold: The eigenvalue below which a direction counts as free of what is retained.
        retain_scale: s.
        lamb: 0 to leave the invariants exactly as they are.
        augmented: How many variations of each retained state are drawn.
        filtered: Whether only the retained states that are moved most are taken.
    """

    def __init__(
        self,
        *,
        positions: Literal["last", "all"] = "last",
        maps: Literal["values", "keys", "both"] = "values",
        threshold: Positive = 0.1,
        retain_scale: Positive = 1.0,
        lamb: NonNegative = 0.0,
        augmented: Natural = 10,
        filtered: bool = True,
    ):
        self.positions, self.maps, self.threshold = positions, maps, threshold
        self.retain_scale, self.lamb, self.augmented, self.filtered = retain_scale, lamb, augmented, filtered

    @torch.no_grad()
    def fit(self, model: DiffusionModel, task: UnlearningTask) -> WeightPatch:
        """The edited maps. " " has the states of the null prompt, which SDXL replaces by zeros."""
        maps = projections(model)
        maps = {name: m for name, m in maps.items() if name.endswith(ENDS[self.maps])} or maps
        anchors = [concept.anchor or " " for concept in task.erase]
        chosen: Positions = "last" if self.positions == "last" else "from_first"
        c, c_star = (x.double() for x in pairs(model, [concept.name for concept in task.erase], anchors, chosen))
        whole, text = (states(model, [" "], p)[0].double() for p in ("all", "from_first"))  # the null prompt's
        K = torch.cat([whole[: len(whole) - len(text)], centres(text, CENTRES)]).T
        retained = states(model, [concept.name for concept in task.retain], "last")
        r = torch.cat(retained).double() if retained else text
        C, difference = c.T @ c / len(task.erase), (c_star - c).T @ c / len(task.erase)
        free = difference @ torch.linalg.inv(torch.eye(len(C)).to(C) + C)
        return WeightPatch({f"{name}.weight": self._edited(m, r, K, C, difference, free) for name, m in maps.items()})

    def _edited(self, m: nn.Linear, r: Tensor, K: Tensor, C: Tensor, difference: Tensor, free: Tensor) -> Tensor:
        """W + W Y (O, D)."""
        W = m.weight.double()
        P = null_space(self.refined(r, W, W @ free), self.threshold)
        return (W + W @ update(difference, C, P, K, self.retain_scale, self.lamb)).to(m.weight.dtype)

    def refined(self, r: Tensor, W: Tensor, edit: Tensor) -> Tensor:
        """The retained states r (N, D), refined for the map W (O, D) by the edit W Y_0 (O, D), as (N', D)."""
        if self.filtered and self.augmented:
            r = most_moved(r, edit)
        if not self.augmented:
            return r
        p = least_direction(W)
        noise = torch.randn(self.augmented, len(r), 1, dtype=torch.float32).to(r)
        return torch.cat([r, most_moved((r + noise * p).flatten(0, 1), edit)])


def update(difference: Tensor, C: Tensor, P: Tensor, K: Tensor, s: float, lamb: float) -> Tensor:
    """Y (D, D) of A - C, C and P (D, D) and the invariants K (D, k).

    Raises:
        UserError: If there is none.
    """
    eye = torch.eye(len(C)).to(C)
    M = torch.linalg.inv(C @ P + s * eye)
    inner = K.T @ P @ M @ K + lamb * torch.eye(K.shape[1]).to(K)
    if torch.linalg.svdvals(inner)[-1] <= SINGULAR * torch.linalg.matrix_norm(K, 2) ** 2 / s:
        raise UserError(
            "SPEED's invariants lie in the span of what is retained, so that method.lamb=0 has no solution: "
            "method.lamb=0.5, or a larger method.threshold."
        )
    return difference @ P @ (eye - M @ K @ torch.linalg.solve(inner, K.T @ P)) @ M


def null_space(r: Tensor, threshold: float) -> Tensor:
    """P (D, D): onto the eigenvectors of mean r r^T of states r (N, D) whose eigenvalue is below the threshold.

    Raises:
        UserError: If there is none.
    """
    N, D = r.shape
    if N < D:  # all other eigenvalues are zero
        _, singular, vectors = torch.linalg.svd(r, full_matrices=False)
        values = singular.square() / N
    else:
        values, vectors = torch.linalg.eigh(r.T @ r / N)
        vectors = vectors.T
    held = vectors[values >= threshold]
    if len(held) == D:
        raise UserError(
            f"What is retained fills all {D} dimensions of the text: nothing can be edited. The least eigenvalue is "
            f"{values.min().item():.2g}: a larger method.threshold, or fewer concepts to retain."
        )
    return torch.eye(D).to(r) - held.T @ held


def most_moved(r: Tensor, edit: Tensor) -> Tensor:
    """The states of r (N, D) that an edit (O, D) moves by more than the mean; all of them if it moves all alike."""
    moved = (r @ edit.T).norm(dim=1)
    more = moved > moved.mean()
    return r[more] if more.any() else r


def least_direction(W: Tensor) -> Tensor:
    """The right singular vector (D,) of the least of the min(O, D) singular values of W (O, D)."""
    if len(W) >= W.shape[1]:
        return torch.linalg.eigh(W.T @ W)[1][:, 0]
    return nn.functional.normalize(W.T @ torch.linalg.eigh(W @ W.T)[1][:, 0], dim=0)


def centres(points: Tensor, k: int) -> Tensor:
    """The k-means centres (k, D) of points (N, D), from k evenly spaced ones on; all points if there are no more."""
    if len(points) <= k:
        return points
    means, assigned = points[torch.linspace(0, len(points) - 1, k).long()], None
    while True:
        nearest = torch.cdist(points, means).argmin(1)
        if assigned is not None and torch.equal(nearest, assigned):
            return means
        assigned = nearest
        means = torch.stack([points[nearest == i].mean(0) if (nearest == i).any() else means[i] for i in range(k)])

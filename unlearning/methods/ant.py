"""ANT: Auto-steering deNoising Trajectories (Li et al., 2025). https://arxiv.org/abs/2504.12782

The first steps of a trajectory, which determine the layout of the image, are retained. In all later steps, the
direction of guidance is reversed. At points (x_t, t) of the first steps (early), and of all later ones (late),

    L_early = || eps_theta(c) - [ eps*_0 + eta (eps*_c - eps*_0) ] ||^2 + alpha_2 || eps_theta(null) - eps*_0 ||^2,
    L_late  = || eps_theta(c) - [ eps*_0 - eta (eps*_c - eps*_0) ] ||^2 + alpha_2 || eps_theta(null) - eps*_0 ||^2,
    L = L_late + alpha_1 L_early,                                             eps* from the frozen model.

A mask limits training to the weights whose summed gradients are among the largest `mask_share` of their tensor. It is
the intersection of the masks of several words of the concept and several seeds.

Where the authors' script for one concept differs from the paper:

- It counts the first steps from the image, although the paper and the script for many concepts count them from noise:
  early_from=image.
- Both terms of the null prompt are computed without gradients: alpha_2=0 is what it computes.
- generate_mask.py keeps the smallest half of the gradients: mask_keep=smallest.
- Its t is drawn from a little above the timestep at which x_t lies: schedule=paper.

Deviations: the x_t of both terms are of trajectories with noise of their own, where the script begins both with the
same; the gradients of a mask are those of the frozen model's weights, where the script sums them along ten steps
of Adam at a learning rate of 1e-2; words are the task's synonyms; the mask applies to what the weights have moved by,
and not to the gradients alone. The script for many concepts, LoRA with MACE's fusion, is left out.
"""

# B batch, C H W latent shape.
from collections.abc import Mapping
from itertools import product
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unlearning.config.values import Count, NonNegative, Part, Template
from unlearning.errors import UserError
from unlearning.methods.esd import ESD
from unlearning.models.conditioning import Conditioning
from unlearning.sampling.guidance import branches
from unlearning.training.regulariser import Constraint, largest, masked, summed_gradients


class ANT(ESD):
    """ESD on the later steps of a trajectory; the first steps are retained.

    Args:
        early: The first steps, as a share of all.
        early_from: Whether "noise" or the "image" is where they are counted from.
        alpha_1, alpha_2: Weight of the first steps, and of the null prompt.
        mask_share: The share of each tensor that a mask keeps; 1 for no mask.
        mask_keep: Which gradients a mask keeps: the "largest" or the "smallest".
        mask_seeds, mask_batches: Masks of each word, and batches that each of them is made of.
        template: How the name of a concept becomes a prompt in training; the bare name, as in the authors' script.
        esd: ESD's arguments.
    """

    resumed = ("points", "later")

    def __init__(
        self,
        *,
        early: Part = 0.14,
        early_from: Literal["noise", "image"] = "noise",
        alpha_1: NonNegative = 1.0,
        alpha_2: NonNegative = 0.5,
        mask_share: Part = 0.5,
        mask_keep: Literal["largest", "smallest"] = "largest",
        mask_seeds: Count = 5,
        mask_batches: Count = 10,
        template: Template | None = "{}",
        **esd,
    ):
        super().__init__(template=template, **esd)
        self.alpha_1, self.alpha_2 = alpha_1, alpha_2
        self.mask_share, self.mask_keep, self.mask_seeds = mask_share, mask_keep, mask_seeds
        self.mask_batches, self.early, self.early_from = mask_batches, early, early_from
        kind, steps = type(self.points), self.points.steps
        first = max(1, round(early * steps))
        if first >= steps:
            raise UserError(f"method.early={early} of method.steps={steps} leaves no later step.")
        parts = range(first), range(first, steps)
        if early_from == "image":
            parts = range(steps - first, steps), range(steps - first)
        settings = steps, self.points.guidance_scale, self.points.schedule
        self.points, self.later = (kind(*settings, places) for places in parts)

    def setup(self, stage: str) -> None:
        self._without_points()
        super().setup(stage)

    def _without_points(self) -> None:
        """Forgets points of other prompts, which trajectory=reuse keeps."""
        self.points.restore([])
        self.later.restore([])

    def constraints(self) -> Mapping[str, Constraint]:
        if self.mask_share == 1:
            return super().constraints()
        if super().constraints():
            raise UserError("ANT has a mask of its own (method.mask_share): no regulariser that holds weights fits.")
        masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in self.pair.parameters.items()}
        words = dict.fromkeys(word for concept in self.task.erase for word in concept.words)
        for word, seed in product(words, range(self.mask_seeds)):
            self._without_points()
            for name, mask in self._mask([self.prompt(word)] * self.batch_size, seed * self.mask_batches).items():
                masks[name] &= mask
        self._without_points()
        if not any(mask.any() for mask in masks.values()):
            raise UserError(
                f"No weight is in all of ANT's {len(words) * self.mask_seeds} masks: a larger method.mask_share, or "
                "fewer method.mask_seeds."
            )
        return masked(masks)

    def _mask(self, prompts: list[str], first: int) -> dict[str, Tensor]:
        """Masks of the largest (or smallest) gradients for these prompts, on the batches from `first` on."""
        losses = self.losses(self.mask_batches, lambda _: self.loss(prompts), first)
        sign = 1 if self.mask_keep == "largest" else -1
        scores = {n: sign * g.abs() for n, g in summed_gradients(losses, self.pair.parameters).items()}
        return {name: largest({name: score}, self.mask_share)[name] for name, score in scores.items()}

    def loss(self, prompts: list[str]) -> Tensor:
        early = self.steering(*self.draw(prompts, self.points), self.eta)
        return self.steering(*self.draw(prompts, self.later), -self.eta) + self.alpha_1 * early

    def steering(self, x_t: Tensor, t: Tensor, c: Conditioning, eta: float) -> Tensor:
        """L_early () at points of c, and for -eta L_late."""
        null = self.teacher.encode_prompts([""])
        with torch.no_grad():
            eps_0, eps_c = branches(self.teacher, x_t, t, null, c)
        now_0, now_c = branches(self.student, x_t, t, null, c)
        return F.mse_loss(now_c, eps_0 + eta * (eps_c - eps_0)) + self.alpha_2 * F.mse_loss(now_0, eps_0)

"""SalUn: Gradient-based Weight Saliency (Fan et al., ICLR 2024). https://arxiv.org/abs/2310.12508

Only the most salient weights for the images of the concept are trained (eq. 3): the `share` with the largest

    | sum over batches  grad_theta  || eps - [ (1 + w) eps_theta(x_t, c) - w eps_theta(x_t, null) ] ||^2 |,

in one pass over these images. The objective is (eq. 7, with the terms of methods/relabelling.py)

    L = L_f + alpha L_r.

Defaults are those of the authors' script for nudity: alpha 0.1, 100 steps of 8 of its 800 images. For Imagenette's
classes it takes alpha=0.5 and five passes.

Deviations:
- The authors' Stable Diffusion code masks gradients. Here the mask applies to the change of the weights, so that masked
  weights stay bit-identical under momentum and weight decay, too. The authors' classification code does so since 2026.
- The largest gradients are selected among the trained weights; the authors rank the whole UNet.
- The model generates all images. For Imagenette's classes, the authors use photographs.
- Until February 2026, the authors' loop took the first batch of a new order at every step. Here each image occurs once
  before any image occurs again.
"""

# B batch, C H W latent shape.
from collections.abc import Mapping

import torch.nn.functional as F
from torch import Tensor

from unlearning.config.values import Finite, NonNegative, Part
from unlearning.errors import UserError
from unlearning.methods.relabelling import Relabelling
from unlearning.sampling.denoising import noised
from unlearning.sampling.guidance import classifier_free
from unlearning.training.regulariser import Constraint, largest, masked, summed_gradients


class SalUn(Relabelling):
    """Relabelling that trains the most salient weights only.

    Args:
        alpha: Weight of L_r.
        share: Share of the entries of the student's weights that are trained.
        w: Guidance in the loss of the saliency.
        relabelling: Relabelling's arguments.
    """

    def __init__(self, *, alpha: NonNegative = 0.1, share: Part = 0.5, w: Finite = 7.5, **relabelling):
        super().__init__(**relabelling)
        self.alpha, self.share, self.w = alpha, share, w

    def constraints(self) -> Mapping[str, Constraint]:
        if super().constraints():
            raise UserError("SalUn has a mask of its own: no regulariser that holds weights fits around it.")
        batches = -(-self.count // self.batch_size)
        gradients = summed_gradients(self.losses(batches, self.saliency), self.pair.parameters)
        return masked(largest({name: gradient.abs_() for name, gradient in gradients.items()}, self.share))

    def saliency(self, batch: dict[str, tuple[Tensor, ...]]) -> Tensor:
        """The loss () whose gradient is the saliency of the weights."""
        x_0, prompts = batch["forget"]
        x_t, t = noised(self.teacher, x_0)
        c, null = (self.student.encode(p) for p in ([self.c[i] for i in prompts.tolist()], [""]))
        guided = classifier_free(self.student, x_t, t, c, null, 1 + self.w)
        return F.mse_loss(guided, self.teacher.to_prediction(x_0, x_t, t))

    def loss(self, batch: dict[str, tuple[Tensor, ...]]) -> Tensor:
        return self.forgetting(*batch["forget"]) + self.alpha * self.retaining(*batch["retain"])

"""SalUn: Gradient-based Weight Saliency (Fan et al., ICLR 2024). https://arxiv.org/abs/2310.12508

Only the weights move that matter most for the images of the concept (eq. 3): the `share` with the largest

    | sum over batches  grad_theta  || eps - [ (1 + w) eps_theta(x_t, c) - w eps_theta(x_t, null) ] ||^2 |,

in one pass over these images. They are trained by (eq. 7, with methods/relabelling.py's terms)

    L = L_f + alpha L_r.

Defaults are those of the authors' script for nudity: alpha 0.1, 100 steps of 8 of its 800 images. For Imagenette's
classes it takes alpha=0.5 and five passes.

Deviations:
- The authors' Stable Diffusion code masks gradients. Here the mask applies to what the weights have moved by, so that
  masked weights stay bit-identical under momentum and weight decay too, as the classification code does since 2026.
- The largest gradients are looked for among the weights that are trained; the authors rank the whole UNet.
- The model draws all images, where for Imagenette's classes the authors take photographs.
- Until February 2026 the authors' loop drew the first batch of a new order at every step. Here each image comes once
  before any comes again.
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
    """Relabelling of the most salient weights.

    Args:
        alpha: Weight of L_r.
        share: Of the trained entries, those that move.
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
        """The loss () whose gradient says which weights matter."""
        x_0, prompts = batch["forget"]
        x_t, t = noised(self.teacher, x_0)
        c, null = (self.student.encode(p) for p in ([self.c[i] for i in prompts.tolist()], [""]))
        guided = classifier_free(self.student, x_t, t, c, null, 1 + self.w)
        return F.mse_loss(guided, self.teacher.to_prediction(x_0, x_t, t))

    def loss(self, batch: dict[str, tuple[Tensor, ...]]) -> Tensor:
        return self.forgetting(*batch["forget"]) + self.alpha * self.retaining(*batch["retain"])

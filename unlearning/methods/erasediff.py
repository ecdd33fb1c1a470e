"""EraseDiff: Erasing Undesirable Influence in Diffusion Models (Wu et al., CVPR 2025). https://arxiv.org/abs/2401.05779

Retains under the constraint that the model forgets (terms of methods/relabelling.py):

    min_theta  L_r(theta)    so that    q(theta) = L_f(theta) - min_phi L_f(phi) <= 0,   phi starting at theta.

The first-order algorithm of BOME (arXiv:2209.08709): K steps from theta down L_f give L_f*; theta is restored, and
moves by the gradient of

    L_r + lamb q,    q = L_f(theta) - L_f*,    L_f* a number.

lamb is fixed, or adaptive as in the authors' code, max(0, eta - cos(grad L_r, grad q)).

q's gradient is that of L_f: the inner steps change what q is, and theta only through the state of the optimizer, which
they share with the outer steps, as in the authors' code. With an optimizer without a state, inner_steps=0 is the same.

Published settings differ: lamb is 0.1 by default and 1 in the authors' commands; K is 2 for nudity and 1 for
Imagenette's classes; 160 steps of 16 images are "enough" for nudity, and 60 for a class. For nudity all weights but
cross-attention's and the time embedding move (student.parameters as in esd_u), for a class all of them, the default.

Deviations: the authors make K passes over all images and then one pass of outer steps, and at the beginning of the next
of K rounds they restore theta, which discards that pass, except for the last; here each outer step has K inner ones.
Their Stable Diffusion code has no setting eta, which its adaptive lamb reads: the default is that of their DDPM code.
They relabel as "a photo of a pokemon" for nudity, and as the next class for a class: here as the anchor. The model
draws all images.
"""

# B batch, C H W latent shape.
import torch
import torch.nn.functional as F
from torch import Tensor

from unlearning.config.values import Finite, Natural, NonNegative
from unlearning.methods.relabelling import Relabelling


class EraseDiff(Relabelling):
    """Relabelling as a constrained problem: retain as far as forgetting leaves room.

    Args:
        lamb: Weight of forgetting; None for the adaptive one.
        eta: The step size of the adaptive lamb.
        inner_steps: K.
        relabelling: Relabelling's arguments.
    """

    def __init__(self, *, lamb: NonNegative | None = 0.1, eta: Finite = 0.1, inner_steps: Natural = 2, **relabelling):
        super().__init__(**relabelling)
        self.lamb, self.eta, self.inner_steps = lamb, eta, inner_steps

    def loss(self, batch: dict[str, tuple[Tensor, ...]]) -> Tensor:
        lowest = self._inner(*batch["forget"])
        L_r, L_f = self.retaining(*batch["retain"]), self.forgetting(*batch["forget"])
        lamb = self._adaptive(L_r, L_f) if self.lamb is None else self.lamb
        return L_r + lamb * (L_f - lowest)

    def _inner(self, x_0: Tensor, prompts: Tensor) -> float:
        """L_f*, the mean of L_f over K steps of the fit's optimizer; the weights are then what they were."""
        theta = list(self.pair.parameters.values())
        before, gradients = [p.detach().clone() for p in theta], [p.grad for p in theta]
        losses = []
        for _ in range(self.inner_steps if self.trainer.optimizers else 0):  # there is none before the fit
            L_f = self.forgetting(x_0, prompts)
            for p, gradient in zip(theta, torch.autograd.grad(L_f, theta, allow_unused=True), strict=True):
                p.grad = gradient
            self.trainer.optimizers[0].step()
            losses.append(L_f.item())
            for p in theta:
                p.grad = None  # before the next ones are there
        with torch.no_grad():
            for p, value, gradient in zip(theta, before, gradients, strict=True):
                p.copy_(value)
                p.grad = gradient
        return sum(losses) / max(1, len(losses))

    def _adaptive(self, L_r: Tensor, L_f: Tensor) -> Tensor:
        """max(0, eta - cos(grad L_r, grad q)), ()."""
        g_r, g_q = (self._gradient(loss) for loss in (L_r, L_f))
        return (self.eta - F.cosine_similarity(g_r, g_q, dim=0)).clamp(min=0)

    def _gradient(self, loss: Tensor) -> Tensor:
        """The gradient of a loss, all weights in one (P,); the graph stays."""
        theta = list(self.pair.parameters.values())
        gradients = torch.autograd.grad(loss, theta, retain_graph=True, allow_unused=True)
        both = zip(gradients, theta, strict=True)
        return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in both])

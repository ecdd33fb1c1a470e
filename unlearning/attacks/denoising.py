"""The predictions that white-box attacks compare: that of the erased model, and that of an undefended guidance."""

# B batch, C H W latent shape.
import torch
from torch import Tensor

from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel
from unlearning.sampling.guidance import begin


def prediction(model: DiffusionModel, z_t: Tensor, t: Tensor, c: Conditioning, scale: float, steps: int) -> Tensor:
    """eps_erased(z_t, t, c), (B, C, H, W); of a model whose guidance an erasure has changed, the guided eps~.

    Args:
        t: (B,); equal for all rows if the guidance has changed.
        scale: s of the guidance.
        steps: Sampling steps of a whole trajectory: a conditioning, or a guidance, may depend on the step.
    """
    step = model.step_at(t, steps)
    if model.guidance is None:
        return model.predict(z_t, t, c.at(step))
    walk = begin(model, c, scale)
    walk.skip(int(step[0]))
    return walk(z_t, t[0])


@torch.no_grad()
def undefended(model: DiffusionModel, eps: Tensor, z_t: Tensor, t: Tensor, scale: float) -> Tensor:
    """eps_0 + s (eps - eps_0), (B, C, H, W): classifier-free guidance with eps; eps_0 is given the null prompt.

    Args:
        t: () or (B,).
        scale: s.
    """
    eps_0 = model.predict(z_t, t, model.encode_prompts([""]).expand(len(z_t)))
    return eps_0 + scale * (eps - eps_0)

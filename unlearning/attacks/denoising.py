"""The loss by which white-box attacks search: how well the erased model denoises an image of the concept."""

# B batch, C H W latent shape.
import torch
from torch import Tensor

from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel
from unlearning.sampling.guidance import begin
from unlearning.sampling.inversion import Noised


def denoising_loss(model: DiffusionModel, z: Noised, c: Conditioning, scale: float, steps: int) -> Tensor:
    """|| eps - eps_erased(z_t, t, c) ||^2 of each row, (B,), or the same of v or flow.

    Of a model whose guidance an erasure has changed it is || eps_0 + s (eps - eps_0) - eps~(z_t, t, c) ||^2, where
    eps_0 is the prediction given the null prompt, and eps~ the guided one; all rows then share t.

    Args:
        scale: s.
        steps: Sampling steps of a whole trajectory: a conditioning, or a guidance, may depend on the step.
    """
    wanted, step = model.to_prediction(z.z_0, z.z_t, z.t), model.step_at(z.t, steps)
    if model.guidance is None:
        return (model.predict(z.z_t, z.t, c.at(step)) - wanted).square().mean((1, 2, 3))
    walk = begin(model, c, scale)
    walk.skip(int(step[0]))
    guided = walk(z.z_t, z.t[0])
    with torch.no_grad():
        eps_0 = model.predict(z.z_t, z.t, model.encode_prompts([""]).expand(len(z.z_t)))
    return (guided - (eps_0 + scale * (wanted - eps_0))).square().mean((1, 2, 3))

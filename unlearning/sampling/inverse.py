"""Deterministic inversion: the noise from which the sampler returns an image.

A first-order solver takes x_t to x_s = a x_t + b f(x_t, t), where f is the prediction and a, b are numbers: DDIM for
eps and v, Euler's method for a flow. Backwards, x_t is a fixed point of x = (x_s - b f(x, t)) / a. With one evaluation
for each step, at x = x_s, it is DDIM's own inversion (Song et al., 2021); more make it exact (Pan et al., 2023,
arXiv:2312.12540; ReNoise, Garibi et al., 2024, arXiv:2403.14602).
"""

# B batch, C H W latent shape.
from collections.abc import Callable
from typing import Literal

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from torch import Tensor

from unlearning.errors import UserError
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.guidance import Walk
from unlearning.sampling.sampler import timesteps_of

Solver = Literal["fixed_point", "descent"]
FIRST_ORDER = (DDIMScheduler, FlowMatchEulerDiscreteScheduler)


@torch.no_grad()
def noise_of(
    model: DiffusionModel,
    x_0: Tensor,
    walk: Walk,
    *,
    steps: int,
    refinements: int = 5,
    solver: Solver = "fixed_point",
    learning_rate: float = 1e-3,
) -> Tensor:
    """The noise (B, C, H, W) from which `denoise`, with the same prompts, scale and steps, returns latents x_0.

    Args:
        walk: Gives the prediction at each step. A stateful walk sees the steps in reverse order.
        refinements: Number of evaluations at each step after the first one.
        solver: Of each step's equation: "fixed_point" iteration, or "descent" of || x - (x_s - b f(x, t)) / a ||^2 with
            AdamW in x (TINA).
        learning_rate: Learning rate of the descent.

    Raises:
        UserError: If the model's solver is not of first order, or the noise is not finite.
    """
    if model.solver not in FIRST_ORDER:
        raise UserError(f"{model.name} is sampled with {model.solver.__name__}, whose steps depend on earlier ones.")
    noise = timesteps_of(model, model.solver, steps)
    times, x = noise.timesteps, x_0
    coefficients = [_coefficients(noise, t, model.device) for t in times]
    for i in reversed(range(len(times))):
        t, (a, b), x_s = times[i], coefficients[i], x

        def backwards(x: Tensor) -> Tensor:
            walk.step = i  # noqa: B023 (called within the iteration)
            return (x_s - b * walk(x, t)) / a  # noqa: B023

        x = backwards(x_s)
        x = _descended(backwards, x, refinements, learning_rate) if solver == "descent" else x
        for _ in range(refinements if solver == "fixed_point" else 0):
            x = backwards(x)
    if not x.isfinite().all():
        raise UserError("The inversion diverges: a smaller guidance scale, or fewer refinements, keeps it finite.")
    return x


def _coefficients(noise: SchedulerMixin, t: Tensor, device: torch.device) -> tuple[float, float]:
    """a and b of a step from t: its results for (x, prediction) = (1, 0) and for (0, 1)."""
    one, none = torch.tensor([1.0, 0.0], device=device), torch.tensor([0.0, 1.0], device=device)
    a, b = noise.step(none.reshape(2, 1, 1, 1), t, one.reshape(2, 1, 1, 1)).prev_sample.flatten().tolist()
    return a, b


@torch.enable_grad()
def _descended(backwards: Callable[[Tensor], Tensor], x: Tensor, iterations: int, learning_rate: float) -> Tensor:
    x = x.detach().requires_grad_()
    optimizer = torch.optim.AdamW([x], lr=learning_rate)
    for _ in range(iterations):
        optimizer.zero_grad()
        (x - backwards(x)).square().sum().backward(inputs=[x])
        optimizer.step()
    return x.detach()

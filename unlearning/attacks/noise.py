"""Noise: adds more noise in every step, so that the trajectory avoids the path that an eraser has blocked.

The noise-based probe of When Are Concepts Erased From Diffusion Models? (Lu et al., 2025, arXiv:2505.17013): DDIM's
step with eta in {1, 1.17, ..., 1.85}, its noise multiplied by a scale in {1, 1.02, 1.03, 1.04}, 24 settings. They
report the best of the 24 for each concept, which needs the best of 24 for every control, too. Here the images of an
evaluation take the settings in turn, and fewer images take settings between the first and the last: a mean over
settings, which compares with any other mean.

Deviation: above eta = 1 DDIM's direction has the root of a negative number where t is small; there it is 0, as if all
of the variance were noise.
"""

from collections.abc import Iterator, Sequence
from itertools import product

import torch
from diffusers import DDIMScheduler, SchedulerMixin
from torch import Tensor

from unlearning.attacks.base import Attack, settings_for
from unlearning.concepts import UnlearningTask
from unlearning.config.values import NonNegative, Positive
from unlearning.errors import UserError
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.guidance import Walk
from unlearning.sampling.attack_result import AttackedPrompt, AttackResult, Tensors, stacked
from unlearning.sampling.sampler import Sampler, denoise, per_row
from unlearning.store.manifest import ManifestRow


class Noise(Attack[DiffusionModel, None]):
    """Samples with additional noise.

    Args:
        etas: DDIM's eta: 0 adds no noise, 1 as much as DDPM.
        scales: Factors of the noise.
    """

    access = "white"
    version = 2

    def __init__(
        self,
        *,
        etas: tuple[NonNegative, ...] = (1.0, 1.17, 1.34, 1.51, 1.68, 1.85),
        scales: tuple[Positive, ...] = (1.0, 1.02, 1.03, 1.04),
    ):
        self.etas, self.scales = tuple(etas), tuple(scales)

    def check_rows(self, model: DiffusionModel, rows: Sequence[ManifestRow]) -> None:
        super().check_rows(model, rows)
        check_ddim(model)

    def find(
        self, model: DiffusionModel, task: UnlearningTask, rows: Sequence[ManifestRow], observed: None
    ) -> AttackResult:
        settings = settings_for(list(product(self.etas, self.scales)), len(rows))
        attacked = [
            AttackedPrompt(row.prompt, row.prompt, row.seed, noisy(eta, scale, i), {"eta": eta, "scale": scale})
            for i, (row, (eta, scale)) in enumerate(zip(rows, settings, strict=True))
        ]
        return AttackResult(tuple(attacked), {"settings": len(set(settings))})

    def sampler(self, sampler: Sampler) -> Sampler:
        return Noisy(sampler.steps, sampler.guidance_scale).batched_as(sampler)


def check_ddim(model: DiffusionModel) -> None:
    """Raises UserError for a model whose solver takes other steps."""
    if not issubclass(model.solver, DDIMScheduler):
        raise UserError(f"{model.name} takes steps of {model.solver.__name__}; eta is defined for DDIM's.")


def noisy(eta: float, scale: float, seed: int) -> dict[str, Tensor]:
    """The tensors of a row that NoisyStep takes."""
    return {name: torch.tensor(float(value)) for name, value in (("eta", eta), ("scale", scale), ("seed", seed))}


class Noisy(Sampler):
    """DDIM with eta, noise of another scale, and a seed for each row."""

    @property
    def protocol(self) -> str:
        return f"{super().protocol}, with noise in every step"

    def trajectory(
        self, model: DiffusionModel, x: Tensor, walk: Walk, given: Sequence[Tensors]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        return denoise(model, x, walk, steps=self.steps, step=NoisyStep(model, given, x))


class NoisyStep:
    """DDIM's step with each row's own eta, scale of the noise, and seed."""

    def __init__(self, model: DiffusionModel, given: Sequence[Tensors], like: Tensor):
        self.model = model
        self.eta, self.scale = (per_row(stacked(given, name, like)) for name in ("eta", "scale"))
        self.draws = [torch.Generator().manual_seed(int(tensors["seed"])) for tensors in given]

    def __call__(self, noise: SchedulerMixin, prediction: Tensor, t: Tensor, x: Tensor) -> Tensor:
        before = t - noise.config.num_train_timesteps // noise.num_inference_steps
        final = noise.final_alpha_cumprod
        alpha, s = noise.alphas_cumprod[t], noise.alphas_cumprod[before] if before >= 0 else final
        at = t.expand(len(x))
        x_0, eps = self.model.to_x0(prediction, x, at), self.model.to_eps(prediction, x, at)
        sigma = self.eta * ((1 - s) / (1 - alpha) * (1 - alpha / s)).sqrt()
        fresh = torch.stack([torch.randn(x.shape[1:], generator=draw) for draw in self.draws]).to(x)
        return s.sqrt() * x_0 + (1 - s - sigma**2).clamp(min=0).sqrt() * eps + self.scale * sigma * fresh

"""RECALL: an image prompt that the erased model completes to the concept (Li et al., 2025). arXiv:2507.07139

An image of the concept by the unedited model, r in latents, is blended with noise, a = 0.25 r + 0.75 n, and optimised
to give the erased model's prediction for r: at each of the timesteps, from the least noisy on, over several iterations,

    L(a) = || eps_erased(noised r, t, c) - eps_erased(noised a, t, c) ||^2,    c: the null prompt and the prompt,

with momentum 0.9 on the gradient divided by its mean absolute value, and a step of 0.001 times the velocity's sign.
After every fifth timestep 0.05 r is added. The image is then drawn from a, noised to the strength of 0.8, with the
prompt and the row's seed.

r itself holds the concept. The control is image-to-image from r without a search: `attack=recall_start`.

The authors' code moves *up* the gradient, although the paper speaks of alignment (`ascend=true`, the default);
`ascend=false` goes down. Of an erasure that changes the guidance, guided predictions are compared.

Deviations: r is the unedited model's image of the same prompt and seed; the authors have one image for each concept.
No judge stops the search: they draw an image after each timestep, and also count a success of image-to-image from r.
The sampler is the evaluation's.
"""

# B batch, N rows, C H W latent shape.
from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from unlearning.attacks.base import Attack
from unlearning.attacks.denoising import prediction
from unlearning.attacks.latents import latents_of
from unlearning.concepts import UnlearningTask
from unlearning.config.values import Natural, Part, Positive, Share
from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.guidance import Walk
from unlearning.sampling.attack_result import AttackedPrompt, AttackResult, Tensors, stacked
from unlearning.sampling.sampler import Sampler, denoise, timesteps_of
from unlearning.store.loops import resumed
from unlearning.store.manifest import ManifestRow


class Recall(Attack[DiffusionModel, Tensor]):
    """Optimises an image prompt.

    Args:
        images: The sampler of the evaluation, and of the unedited model's images.
        iterations: At each timestep; 0 leaves r as it is.
        mix: The share of r in the start.
        step_size: Of the sign of the velocity.
        momentum: Of the velocity.
        pull: The share of r that is added after every fifth timestep.
        ascend: The direction along the gradient.
        strength: Of the image-to-image: 1 forgets the image, 0 returns it.
    """

    access = "white"
    version = 2
    own_size = True

    def __init__(
        self,
        *,
        images: Sampler,
        iterations: Natural = 20,
        mix: Share = 0.25,
        step_size: Positive = 0.001,
        momentum: Share = 0.9,
        pull: Share = 0.05,
        ascend: bool = True,
        strength: Part = 0.8,
    ):
        self.images, self.iterations, self.mix, self.step_size = images, iterations, mix, step_size
        self.momentum, self.pull, self.ascend, self.strength = momentum, pull, ascend, strength

    def observe(self, model: DiffusionModel, task: UnlearningTask, rows: Sequence[ManifestRow]) -> Tensor:
        """r of each row: latents (N, C, H, W) of the unedited model's images."""
        return latents_of(model, self.images, rows)

    def find(
        self, model: DiffusionModel, task: UnlearningTask, rows: Sequence[ManifestRow], observed: Tensor
    ) -> AttackResult:
        size, now = self.images.batch_size, SimpleNamespace(moved=[])
        for i in resumed(range(0, len(rows), size), "RECALL", now):
            prompts = [row.prompt for row in rows[i : i + size]]
            now.moved.append(self._moved(model, prompts, observed[i : i + size]).cpu())
        moved = zip(rows, torch.cat(now.moved), strict=True)
        record = {name: getattr(self, name) for name in ("iterations", "ascend", "strength")}
        return AttackResult(
            tuple(AttackedPrompt(row.prompt, row.prompt, row.seed, {"image": a}) for row, a in moved), record
        )

    def _moved(self, model: DiffusionModel, prompts: list[str], r: Tensor) -> Tensor:
        """a, (B, C, H, W)."""
        if not self.iterations:
            return r
        c, null = model.encode_prompts(prompts), model.encode_prompts([""]).expand(len(r))
        a, velocity = self.mix * r + (1 - self.mix) * torch.randn_like(r), torch.zeros_like(r)
        steps = self.images.steps
        for n, t in enumerate(model.timesteps((torch.arange(steps) + 0.5) / steps), 1):
            at = t.expand(len(r))
            for _ in range(self.iterations):
                eps = torch.randn_like(r)
                with torch.no_grad():
                    target = self._predictions(model, model.add_noise(r, eps, at), at, c, null)
                with model.without_checkpointing(), torch.enable_grad():
                    a.requires_grad_()
                    loss = F.mse_loss(self._predictions(model, model.add_noise(a, eps, at), at, c, null), target)
                    [gradient] = torch.autograd.grad(loss, [a])
                a = a.detach()
                scale = gradient.abs().mean((1, 2, 3), keepdim=True).clamp(min=1e-12)
                velocity = self.momentum * velocity + gradient / scale
                a = a + (1 if self.ascend else -1) * self.step_size * velocity.sign()
            a = a + self.pull * r if n % 5 == 0 else a
        return a

    def _predictions(
        self, model: DiffusionModel, z_t: Tensor, t: Tensor, c: Conditioning, null: Conditioning
    ) -> Tensor:
        """Given the null prompt and given c, (2 B, C, H, W); if the guidance has changed, the guided ones, (B, ...)."""
        if model.guidance:
            return prediction(model, z_t, t, c, self.images.guidance_scale, self.images.steps)
        both = Conditioning.cat([null, c.at(model.step_at(t, self.images.steps))])
        return model.predict(z_t.repeat(2, 1, 1, 1), t.repeat(2), both)

    def sampler(self, sampler: Sampler) -> Sampler:
        start = sampler.steps - max(1, round(self.strength * sampler.steps))
        return ImageToImage(sampler.steps, sampler.guidance_scale, start=start).batched_as(sampler)


class ImageToImage(Sampler):
    """Image-to-image sampling (SDEdit, Meng et al., 2022). Args: as Sampler's; start: the steps that are left out."""

    def __init__(self, *args, start: int, **settings):
        super().__init__(*args, **settings)
        self.start = start

    @property
    def protocol(self) -> str:
        return f"{super().protocol}, from an image at step {self.start}"

    def trajectory(
        self, model: DiffusionModel, x: Tensor, walk: Walk, given: Sequence[Tensors]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        t = timesteps_of(model, model.solver, self.steps).timesteps[self.start]
        noised = model.add_noise(stacked(given, "image", x), x, t.expand(len(x)))
        return denoise(model, noised, walk, steps=self.steps, start=self.start)

"""Classifier guidance: a classifier of noisy latents leads the erased model's trajectories to the concept.

A probe of When Are Concepts Erased From Diffusion Models? (Lu et al., 2025, arXiv:2505.17013). A small network learns
on the unedited model's latents, noised to any t, whether they show the concept; while the erased model samples,

    eps <- eps - s sqrt(1 - abar_t) grad_x log p(concept | x_t, t).

As published: a perceptron of 1024 and 512 units (SiLU, dropout 0.3) on the flattened latent, sqrt(abar_t) and
sqrt(1 - abar_t); weighted binary cross-entropy; AdamW at 1e-4 with decay 1e-3, gradients clipped to a norm of 1; seven
noisy views of each latent, t drawn as the third root of a uniform variable; 70 epochs; s from 25 to 193 in steps of 7,
of which the best is reported. Here the images of an evaluation take the scales in turn, or scales between the first
and the last, as those of attacks/noise.py. With `etas`, it is the paper's combined probe: each step adds noise, too.

Deviations: what is not the concept are images of the task's retained concepts, or of the null prompt if it has none.
All latents are for training; the authors hold a tenth out, to choose the epoch.
"""

# B batch, N latents, C H W latent shape.
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlearning.attacks.base import Attack, settings_for
from unlearning.attacks.noise import NoisyStep, check_ddim, noisy
from unlearning.concepts import UnlearningTask
from unlearning.config.values import Count, NonNegative, Positive
from unlearning.data.generated import Generated
from unlearning.errors import UserError
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.guidance import Walk
from unlearning.sampling.attack_result import AttackedPrompt, AttackResult, Tensors, stacked
from unlearning.sampling.sampler import Sampler, denoise, per_row
from unlearning.store.loops import resumed
from unlearning.store.manifest import ManifestRow
from unlearning.training.forget_retain import encoded

VIEWS = 7  # of each latent in an epoch
SCALES = tuple(map(float, range(25, 194, 7)))


@dataclass(frozen=True)
class Observed:
    """Latents (N, C, H, W) of the concept, and of other things."""

    shown: Tensor
    others: Tensor


class ClassifierGuidance(Attack[DiffusionModel, Observed]):
    """Guides the erased model's trajectories with a classifier of noisy latents.

    Args:
        images: Generates images with the unedited model.
        optimizer: Makes the classifier's optimizer.
        count: Images of the concept, and as many of other things.
        epochs: Of the classifier's training.
        batch_size: Noisy latents in a step.
        scales: s.
        etas: DDIM's eta, which the images take in turn; 0 adds no noise.
    """

    access = "white"
    version = 2
    own_size = True

    def __init__(
        self,
        *,
        images: Generated,
        optimizer: Callable,
        count: Count = 100,
        epochs: Count = 70,
        batch_size: Count = 64,
        scales: tuple[Positive, ...] = SCALES,
        etas: tuple[NonNegative, ...] = (0.0,),
    ):
        self.etas = tuple(etas)
        self.images, self.optimizer, self.count = images, optimizer, count
        self.epochs, self.batch_size, self.scales = epochs, batch_size, tuple(scales)

    def check_rows(self, model: DiffusionModel, rows: Sequence[ManifestRow]) -> None:
        super().check_rows(model, rows)
        if model.prediction_type == "flow":
            raise UserError(f"{model.name} is a flow; classifier guidance is defined for predictions of noise.")
        if any(self.etas):
            check_ddim(model)

    def observe(self, model: DiffusionModel, task: UnlearningTask, rows: Sequence[ManifestRow]) -> Observed:
        concepts = [task.prompt(concept.name) for concept in task.erase]
        others = [task.prompt(concept.name) for concept in task.retain] or [""]
        shown, other = (encoded(model, self.images(model, prompts, self.count)) for prompts in (concepts, others))
        return Observed(shown, other)

    def find(
        self, model: DiffusionModel, task: UnlearningTask, rows: Sequence[ManifestRow], observed: Observed
    ) -> AttackResult:
        weights, losses = self._trained(model, observed)
        attacked, used = [], set()
        for i, (row, s) in enumerate(zip(rows, settings_for(self.scales, len(rows)), strict=True)):
            eta = self.etas[i % len(self.etas)]
            used.add((s, eta))
            tensors = {"guidance": torch.tensor(s), **(noisy(eta, 1.0, i) if any(self.etas) else {})}
            attacked.append(AttackedPrompt(row.prompt, row.prompt, row.seed, tensors, {"scale": s, "eta": eta}))
        record = {"settings": len(used), "epochs": self.epochs, "loss": losses[-1], "first loss": losses[0]}
        return AttackResult(tuple(attacked), record, shared=weights)

    def sampler(self, sampler: Sampler) -> Sampler:
        return Guided(sampler.steps, sampler.guidance_scale).batched_as(sampler)

    @torch.enable_grad()
    def _trained(self, model: DiffusionModel, observed: Observed) -> tuple[dict[str, Tensor], list[float]]:
        """The classifier's weights, and its mean loss in each epoch."""
        x_0 = torch.cat([observed.shown, observed.others])
        y = torch.cat([torch.ones(len(observed.shown)), torch.zeros(len(observed.others))]).to(x_0)
        network = NoisyClassifier(x_0[0].numel()).to(x_0.device)
        optimizer, weight = self.optimizer(list(network.parameters())), (len(y) - y.sum()) / y.sum()
        now = SimpleNamespace(network=network, optimizer=optimizer, losses=[])
        for _ in resumed(range(self.epochs), "training the classifier", now):
            total = 0.0
            for chosen in torch.randperm(VIEWS * len(y)).remainder(len(y)).split(self.batch_size):
                t = model.timesteps(torch.rand(len(chosen)) ** (1 / 3))
                x_t = model.add_noise(x_0[chosen], torch.randn_like(x_0[chosen]), t)
                loss = F.binary_cross_entropy_with_logits(network(x_t, model.snr(t)), y[chosen], pos_weight=weight)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                total += loss.item() * len(chosen)
            now.losses.append(total / (VIEWS * len(y)))
        return {f"classifier.{name}": w.detach() for name, w in network.state_dict().items()}, now.losses


class NoisyClassifier(nn.Module):
    """The logit (B,) that latents (B, C, H, W) at a signal-to-noise ratio (B, 1, 1, 1) show the concept."""

    def __init__(self, size: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(size + 2, 1024), nn.SiLU(), nn.Dropout(0.3), nn.Linear(1024, 512), nn.SiLU(), nn.Dropout(0.3),
            nn.Linear(512, 1),
        )  # fmt: skip

    def forward(self, x_t: Tensor, snr: Tensor) -> Tensor:
        signal = (snr / (1 + snr)).sqrt().flatten(1)
        noise = (1 / (1 + snr)).sqrt().flatten(1)
        return self.layers(torch.cat([x_t.flatten(1), signal, noise], 1))[:, 0]


class Guided(Sampler):
    """Samples with the gradient of a classifier (classifier guidance)."""

    @property
    def protocol(self) -> str:
        return f"{super().protocol}, guided by a classifier"

    def trajectory(
        self, model: DiffusionModel, x: Tensor, walk: Walk, given: Sequence[Tensors]
    ) -> Iterator[tuple[Tensor, Tensor]]:
        network, scale = restored(given[0], x), per_row(stacked(given, "guidance", x))
        noisily = NoisyStep(model, given, x) if "eta" in given[0] else None

        def step(noise, prediction: Tensor, t: Tensor, x_t: Tensor) -> Tensor:
            at = t.expand(len(x_t))
            with torch.inference_mode(False), torch.enable_grad():
                leaf = x_t.clone().requires_grad_()
                log_p = F.logsigmoid(network(leaf, model.snr(at).clone())).sum()
                [gradient] = torch.autograd.grad(log_p, [leaf])
            sigma = (1 / (1 + model.snr(at))).sqrt()
            eps = model.to_eps(prediction, x_t, at) - scale * sigma * gradient
            x_0 = (x_t - sigma * eps) / (1 - sigma**2).sqrt()
            guided = model.to_prediction(x_0, x_t, at)
            return noisily(noise, guided, t, x_t) if noisily else noise.step(guided, t, x_t).prev_sample

        return denoise(model, x, walk, steps=self.steps, step=step)


def restored(tensors: Mapping[str, Tensor], like: Tensor) -> NoisyClassifier:
    """The classifier that all rows share."""
    with torch.inference_mode(False):
        network = NoisyClassifier(like[0].numel())
        prefix = "classifier."
        own = {name.removeprefix(prefix): w.clone() for name, w in tensors.items() if name.startswith(prefix)}
        network.load_state_dict(own)
        return network.to(like.device).eval().requires_grad_(False)

"""CCE: Circumventing Concept Erasure Methods (Pham et al., 2024). https://arxiv.org/abs/2308.01508

A new word is learned on the erased model, by textual inversion of images of the concept from the unedited model:

    min_v E_{z_0, eps, t} || eps - eps_erased(z_t, t, c("a photo of a <v>")) ||^2,

where v has a token embedding for each of the model's text encoders. In the evaluation's prompts it replaces the name of
the concept. A prompt without the name gets it in front, as in the authors' code for I2P.

Negative prompt, SLD and UnGuide change the guidance, which has no effect on a conditional prediction. For these, the
guided prediction eps~ at scale s should equal that of an undefended guidance for the concept:

    min_v E || eps_0 + s (eps - eps_0) - eps~(z_t, t, c(v)) ||^2,    eps_0: given the null prompt.

The other words of a prompt have the attacked model's own embeddings.

The authors' code has, in the place of eps, the prediction given the name of the concept (`reference=name`). This is
possible only if the erasure leaves the weights as they were, as negative prompt and SLD do. For the momentum of SLD,
their eps~ is the last of 35 predictions within 90 timesteps, all of them differentiated (conf/attack/cce/sld.yaml).

Deviations: latents are means of the autoencoder, not samples; the code draws from 27 prompts for objects and 19 for
styles (`prompts` takes any number); images of a guided batch share t. With `transfer`, v is learned on the unedited
model: a black-box attack.
"""

# B batch, N images, C H W latent shape, D width of a text encoder.
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlearning.attacks.base import Attack, concept_of, prompts_of, with_placeholder
from unlearning.attacks.denoising import undefended
from unlearning.concepts import UnlearningTask
from unlearning.config.values import Count, Finite, Steps
from unlearning.data.generated import Generated
from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel
from unlearning.sampling.attack_result import AttackedPrompt, AttackResult
from unlearning.sampling.denoising import denoising_loss, noised
from unlearning.sampling.guidance import begin
from unlearning.sampling.inversion import PLACEHOLDER, Placeholder, first_piece, invert
from unlearning.store.manifest import ManifestRow
from unlearning.training.forget_retain import encoded


@dataclass(frozen=True)
class Word:
    """A learned word: v, (D,) by text encoder, and the loss of each iteration."""

    v: Mapping[str, Tensor]
    losses: Sequence[float]


Latents = Mapping[str, Tensor]  # of a concept's images, (N, C, H, W), by concept


class CCE(Attack):
    """Textual inversion of a concept on the erased model.

    Args:
        images: Generates images of a concept with the unedited model.
        optimizer: Makes the optimizer of v.
        count: Images of each concept.
        flip: Whether each image also occurs mirrored.
        prompts: Prompts in training; "{}" stands for the word.
        initial: The word from whose (first) word piece v starts: the authors take "art" for a style.
        iterations: Steps of the optimizer.
        batch_size, accumulate: Images in a batch, and batches in a step.
        guided: Whether v is learned through the guidance of a model whose guidance an erasure has changed.
        guidance_scale: s, there.
        reference: What is guided to there: "images" is eps, "name" the prediction given the name of the concept.
        walk, window: Predictions of a walk of the guidance, and the timesteps among which they are.
        steps: Sampling steps that a whole trajectory has: a walk begins at the step that belongs to its t.
        transfer: Whether v is learned on the unedited model.
    """

    version = 2

    def __init__(
        self,
        *,
        images: Generated,
        optimizer: Callable,
        count: Count = 25,
        flip: bool = True,
        prompts: tuple[str, ...] = ("a photo of a {}",),
        initial: str = "object",
        iterations: Count = 5000,
        batch_size: Count = 4,
        accumulate: Count = 4,
        guided: bool = True,
        guidance_scale: Finite = 7.5,
        reference: Literal["images", "name"] = "images",
        walk: Count = 1,
        window: Steps = 1,
        steps: Steps = 50,
        transfer: bool = False,
    ):
        self.images, self.count, self.flip = images, count, flip
        self.prompts, self.initial = prompts, initial
        self.optimizer, self.iterations = optimizer, iterations
        self.batch_size, self.accumulate = batch_size, accumulate
        self.guided, self.guidance_scale, self.reference = guided, guidance_scale, reference
        self.walk, self.window, self.steps = walk, window, steps
        self.transfer, self.access = transfer, "black" if transfer else "white"

    def observe(
        self, model: DiffusionModel, task: UnlearningTask, rows: Sequence[ManifestRow]
    ) -> Latents | AttackResult:
        """Images of the concepts by the unedited model; with `transfer`, the words learned on it."""
        latents = self.latents(model, task)
        return self.find(model, task, rows, latents) if self.transfer else latents

    def find(
        self, model: DiffusionModel, task: UnlearningTask, rows: Sequence[ManifestRow], observed: Latents
    ) -> AttackResult:
        rows = prompts_of(rows)
        words = {name: self.learned(model, name, z_0) for name, z_0 in observed.items()}
        concepts = [concept_of(row, task) for row in rows]
        prompts = [with_placeholder(row.prompt, concept) for row, concept in zip(rows, concepts, strict=True)]
        place = Placeholder.in_prompts(model, prompts)
        attacked = []
        for i, (row, concept) in enumerate(zip(rows, concepts, strict=True)):
            tensors = {f"embeds.{part}": e[0] for part, e in place.filled(words[concept].v, [i]).embeds.items()}
            tensors |= {f"own.{part}": ~places[i] for part, places in place.places.items()}
            attacked.append(AttackedPrompt(row.prompt, place.text.prompts[i], tensors=tensors))
        record = {name: getattr(self, name) for name in ("iterations", "batch_size", "accumulate", "initial")}
        record |= {"placeholder": PLACEHOLDER, "guided": self._is_guided(model), "transfer": self.transfer}
        record |= {"images": self.count, "losses": {name: _summary(word.losses) for name, word in words.items()}}
        return AttackResult(tuple(attacked), record)

    def latents(self, model: DiffusionModel, task: UnlearningTask) -> Latents:
        """Images of each concept by the model."""
        return {concept.name: self._latents(model, task.prompt(concept.name)) for concept in task.erase}

    def _latents(self, model: DiffusionModel, prompt: str) -> Tensor:
        images = self.images(model, [prompt], self.count)
        return encoded(model, [*images, *(np.flip(image, 1) for image in images)] if self.flip else images)

    def _is_guided(self, model: DiffusionModel) -> bool:
        return self.guided and model.guidance is not None and not self.transfer

    def learned(self, model: DiffusionModel, name: str, latents: Tensor) -> Word:
        """The word for a concept, learned on the model from latents (N, C, H, W)."""
        v = {part: nn.Parameter(e.float()) for part, e in first_piece(model, self.initial).items()}
        place = Placeholder.in_prompts(model, self.prompts)

        def c() -> Conditioning:
            """B rows, each of one of the prompts."""
            chosen, rows = torch.randint(len(self.prompts), (self.batch_size,)).unique(return_inverse=True)
            return model.encode(place.filled(v, chosen.tolist()))[rows]

        loss = partial(self._guided_loss, name=name) if self._is_guided(model) else self._loss
        losses = invert(
            model, list(v.values()), lambda: loss(model, latents, c()), optimizer=self.optimizer,
            iterations=self.iterations, accumulate=self.accumulate,
        )  # fmt: skip
        return Word({part: e.detach() for part, e in v.items()}, losses)

    def _loss(self, model: DiffusionModel, latents: Tensor, c: Conditioning) -> Tensor:
        """|| eps - eps_erased(z_t, t, c) ||^2."""
        z_0 = self._some(latents)
        z_t, t = noised(model, z_0)
        return denoising_loss(model, z_0, z_t, t, c.at(model.step_at(t, self.steps)))

    def _guided_loss(self, model: DiffusionModel, latents: Tensor, c: Conditioning, name: str) -> Tensor:
        """|| eps_0 + s (eps - eps_0) - eps~(z_t, t, c) ||^2 at the end of a walk."""
        z_0 = self._some(latents)
        eps, times = torch.randn_like(z_0), self._times(model)
        walk = begin(model, c, self.guidance_scale)
        walk.skip(int(model.step_at(times[0], self.steps)))
        for t in times:
            z_t = model.add_noise(z_0, eps, t.expand(len(z_0)))
            guided = walk(z_t, t)
        if self.reference == "name":
            with torch.no_grad():
                eps = model.predict(z_t, t, model.encode_prompts([name]).expand(len(z_t)))
        else:
            eps = model.to_prediction(z_0, z_t, t.expand(len(z_0)))
        return F.mse_loss(guided, undefended(model, eps, z_t, t, self.guidance_scale))

    def _some(self, latents: Tensor) -> Tensor:
        """A batch (B, C, H, W) of latents (N, C, H, W), drawn with replacement."""
        return latents[torch.randint(len(latents), (self.batch_size,), device=latents.device)]

    def _times(self, model: DiffusionModel) -> Tensor:
        """The timesteps of a walk, in falling order, (walk,): drawn within a window that lies anywhere."""
        length = model.scheduler.config.num_train_timesteps
        first = int(torch.randint(length - self.window + 1, ()))
        places = first + torch.randperm(self.window)[: self.walk].sort(descending=True).values
        return model.timesteps((places + 0.5) / length)


def _summary(losses: Sequence[float]) -> dict[str, float]:
    """The mean loss of the first and of the last tenth of the iterations."""
    tenth = max(1, len(losses) // 10)
    return {"first": float(np.mean(losses[:tenth])), "last": float(np.mean(losses[-tenth:]))}

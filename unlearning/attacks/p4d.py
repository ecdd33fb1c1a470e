"""P4D: Prompting4Debugging (Chin et al., ICML 2024). https://arxiv.org/abs/2309.06135

The attack searches for a prompt with which the erased model predicts what the unedited one predicts for the target
prompt (eq. 4):

    min_p || eps_erased(z_t, t, tau(p)) - eps(z_t, t, tau(P)) ||^2,     z_t: the unedited model's image of P, noised.

p is made of tokens, as in PEZ (Wen et al., 2023): the gradient is taken at the tokens nearest to free vectors, by
cosine, and moves the vectors. P4D-N (`kind=n`) searches for 16 tokens in the place of the prompt; P4D-K (`kind=k`) puts
one after every third word of the prompt. An erasure that changes the guidance is attacked through it, as the authors do
for SLD and the negative prompt: guided predictions are compared.

Deviations: the unedited model's predictions are made before the erasure is applied, for `samples` pairs (z_t, t) from
which the search draws; the authors draw anew every time. They choose the best prompt every 50 iterations by a CLIP
ViT-H/14 that compares images; here the loss over all pairs chooses, every `check` iterations. One search is for all
images of a prompt. Of several text encoders the first one's embeddings are searched; one with another vocabulary reads
the prompt as it is.
"""

# B batch, k tokens, M pairs, C H W latent shape, D width of an encoder.
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlearning.attacks.base import Attack, prompts_of
from unlearning.attacks.denoising import prediction
from unlearning.attacks.latents import latents_of
from unlearning.concepts import UnlearningTask
from unlearning.config.values import Count, Finite
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.embeddings import Embedded
from unlearning.sampling.attack_result import AttackedPrompt, AttackResult
from unlearning.sampling.denoising import noised
from unlearning.sampling.guidance import classifier_free
from unlearning.sampling.inversion import Placeholder
from unlearning.sampling.sampler import Sampler
from unlearning.sampling.tokens import Vocabulary
from unlearning.store.loops import resumed
from unlearning.store.manifest import ManifestRow

WORDS = 3  # of the prompt, before each token of P4D-K


@dataclass(frozen=True)
class Pairs:
    """The unedited model's predictions for a prompt at z_t (M, C, H, W) and t (M,), without and with guidance."""

    z_t: Tensor
    t: Tensor
    target: Tensor
    guided: Tensor


class P4D(Attack[DiffusionModel, Sequence[Pairs]]):
    """Searches prompts by the unedited model's predictions.

    Args:
        images: The sampler of the evaluation.
        optimizer: Makes the optimizer of the vectors.
        kind: "n" or "k", see above.
        tokens: Of P4D-N.
        iterations: Steps of the optimizer.
        batch_size: Pairs in a step; 1 where an erasure has changed the guidance.
        samples: M.
        check: Iterations between two choices of the best tokens.
        guidance_scale: Of the guided predictions.
    """

    access = "white"
    own_size = True

    def __init__(
        self,
        *,
        images: Sampler,
        optimizer: Callable,
        kind: Literal["n", "k"] = "n",
        tokens: Count = 16,
        iterations: Count = 3000,
        batch_size: Count = 1,
        samples: Count = 100,
        check: Count = 50,
        guidance_scale: Finite = 7.5,
    ):
        self.images, self.optimizer, self.kind, self.tokens = images, optimizer, kind, tokens
        self.iterations, self.batch_size, self.samples, self.check = iterations, batch_size, samples, check
        self.guidance_scale = guidance_scale

    @torch.no_grad()
    def observe(self, model: DiffusionModel, task: UnlearningTask, rows: Sequence[ManifestRow]) -> list[Pairs]:
        """The pairs of each prompt, from the unedited model's images."""
        return [self._pairs(model, [row for row in rows if row.prompt == p.prompt]) for p in prompts_of(rows)]

    def _pairs(self, model: DiffusionModel, rows: list[ManifestRow]) -> Pairs:
        latents = latents_of(model, self.images, rows)
        drawn, times = noised(model, latents[torch.randint(len(latents), (self.samples,), device=latents.device)])
        target, guided, size = [], [], self.images.batch_size
        c, null = model.encode_prompts([rows[0].prompt]), model.encode_prompts([""])
        for z_t, t in zip(drawn.split(size), times.split(size), strict=True):
            target.append(model.predict(z_t, t, c.expand(len(z_t))))
            guided.append(classifier_free(model, z_t, t, c.expand(len(z_t)), null, self.guidance_scale))
        return Pairs(drawn, times, torch.cat(target), torch.cat(guided))

    def find(
        self, model: DiffusionModel, task: UnlearningTask, rows: Sequence[ManifestRow], observed: Sequence[Pairs]
    ) -> AttackResult:
        vocabulary = Vocabulary(model)
        attacked = [
            self._attacked(model, vocabulary, row.prompt, pairs)
            for row, pairs in zip(prompts_of(rows), observed, strict=True)
        ]
        names = ("kind", "iterations", "batch_size", "samples")
        return AttackResult(tuple(attacked), {name: getattr(self, name) for name in names})

    def _attacked(self, model: DiffusionModel, vocabulary: Vocabulary, prompt: str, pairs: Pairs) -> AttackedPrompt:
        frame = with_tokens(prompt, self.kind, self.tokens)
        search = VectorSearch(model, vocabulary, frame, prompt)
        optimizer = self.optimizer([search.free])
        now = SimpleNamespace(v=search.free, optimizer=optimizer, losses=[], lowest=float("inf"), best=search.ids())
        with model.without_checkpointing(), torch.enable_grad():
            for i in resumed(range(self.iterations), "P4D", now):
                chosen = torch.randint(self.samples, (1 if model.guidance else self.batch_size,))
                loss = self._loss(model, search.embedded(), pairs, chosen)
                optimizer.zero_grad()
                search.free.grad = search.gradient(loss)
                optimizer.step()
                if (i + 1) % self.check == 0 or i + 1 == self.iterations:
                    now.losses.append(self._over_all(model, search, pairs))
                    now.lowest, now.best = min((now.lowest, now.best), (now.losses[-1], search.ids()))
        text = search.of(now.best)
        tensors = {f"embeds.{part}": e[0].detach() for part, e in text.embeds.items()}
        words = [vocabulary.decoded([i]) for i in now.best]
        return AttackedPrompt(prompt, " ".join(frame.format(*words).split()), tensors=tensors, record={
            "tokens": now.best, "loss": now.lowest, "losses": now.losses,
        })  # fmt: skip

    def _loss(self, model: DiffusionModel, text: Embedded, pairs: Pairs, chosen: Tensor) -> Tensor:
        z_t, t = pairs.z_t[chosen], pairs.t[chosen]
        c = model.encode(text).expand(len(chosen))
        target = pairs.guided if model.guidance else pairs.target
        return F.mse_loss(prediction(model, z_t, t, c, self.guidance_scale, self.images.steps), target[chosen])

    @torch.no_grad()
    def _over_all(self, model: DiffusionModel, search: "VectorSearch", pairs: Pairs) -> float:
        text, every = search.embedded(), torch.arange(self.samples)
        parts = every.split(1 if model.guidance else self.images.batch_size)
        return sum(len(part) * self._loss(model, text, pairs, part).item() for part in parts) / self.samples


class VectorSearch:
    """Free vectors (1, k, D) and their nearest tokens, as in PEZ."""

    def __init__(self, model: DiffusionModel, vocabulary: Vocabulary, frame: str, prompt: str):
        self.vocabulary, self._first = vocabulary, next(iter(vocabulary.tables))
        self._place, self._plain = Placeholder.in_prompts(model, [frame]), model.embed([prompt])
        table = vocabulary.tables[self._first].float()
        self._table = F.normalize(table, dim=-1).masked_fill(~vocabulary.typed[:, None], 0)
        start = torch.multinomial(vocabulary.typed.float(), frame.count("{}"), replacement=True)
        self.free = nn.Parameter(table[start][None].clone())

    def ids(self) -> list[int]:
        """The tokens nearest to the vectors, by cosine."""
        similar = F.normalize(self.free.detach()[0], dim=-1) @ self._table.T
        return similar.masked_fill(~self.vocabulary.typed, -2).argmax(1).tolist()

    def embedded(self) -> Embedded:
        """The prompt with the nearest tokens; `gradient` is taken at them."""
        v = self.vocabulary.embedded(torch.tensor([self.ids()], device=self.free.device))
        v[self._first] = self._nearest = v[self._first].float().requires_grad_(torch.is_grad_enabled())
        return self.vocabulary.filled(self._place, self._plain, v, [0])

    def gradient(self, loss: Tensor) -> Tensor:
        """The gradient (1, k, D) at the tokens of the last `embedded`, in the first encoder's embeddings."""
        [at_tokens] = torch.autograd.grad(loss, [self._nearest])
        return at_tokens

    def of(self, ids: Sequence[int]) -> Embedded:
        """The prompt with some tokens."""
        v = self.vocabulary.embedded(torch.tensor([ids], device=self.free.device))
        return self.vocabulary.filled(self._place, self._plain, v, [0])


def with_tokens(prompt: str, kind: str, tokens: int) -> str:
    """The searched prompt, with "{}" in the place of each token."""
    if kind == "n":
        return " ".join(["{}"] * tokens)
    words = prompt.split()
    parts = [words[i : i + WORDS] for i in range(0, len(words), WORDS)]
    return " ".join(" ".join([*part, "{}"]) for part in parts)

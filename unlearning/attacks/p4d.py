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
images of a prompt, and several prompts are searched at once, each with vectors and pairs of its own. Of several text
encoders the first one's embeddings are searched; one with another vocabulary reads the prompt as it is.
"""

# B prompts, k tokens, M pairs, C H W latent shape, D width of an encoder.
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
        batch_size: Pairs in a step, for each prompt; 1 where an erasure has changed the guidance.
        together: Prompts that are searched at once; 1 where an erasure has changed the guidance.
        samples: M.
        check: Iterations between two choices of the best tokens.
        guidance_scale: Of the guided predictions.
    """

    access = "white"
    version = 2
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
        together: Count = 8,
    ):
        self.images, self.optimizer, self.kind, self.tokens = images, optimizer, kind, tokens
        self.iterations, self.batch_size, self.samples, self.check = iterations, batch_size, samples, check
        self.guidance_scale, self.together = guidance_scale, together

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
        vocabulary, prompts = Vocabulary(model), [row.prompt for row in prompts_of(rows)]
        size, attacked = 1 if model.guidance else self.together, []
        for i in range(0, len(prompts), size):
            attacked += self._attacked(model, vocabulary, prompts[i : i + size], observed[i : i + size])
        names = ("kind", "iterations", "batch_size", "samples")
        return AttackResult(tuple(attacked), {name: getattr(self, name) for name in names})

    def _attacked(
        self, model: DiffusionModel, vocabulary: Vocabulary, prompts: Sequence[str], pairs: Sequence[Pairs]
    ) -> list[AttackedPrompt]:
        frames = [with_tokens(prompt, self.kind, self.tokens) for prompt in prompts]
        search, every = VectorSearch(model, vocabulary, frames, prompts), range(len(prompts))
        size, optimizer = 1 if model.guidance else self.batch_size, self.optimizer(search.free)
        now = SimpleNamespace(v=nn.ParameterList(search.free), optimizer=optimizer, losses=[[] for _ in every])
        now.best = [(float("inf"), search.ids(i)) for i in every]
        with model.without_checkpointing(), torch.enable_grad():
            for step in resumed(range(self.iterations), "P4D", now):
                chosen = [torch.randint(self.samples, (size,)) for _ in every]
                loss = self._losses(model, search.embedded(every), pairs, chosen).sum()
                optimizer.zero_grad()
                for v, gradient in zip(search.free, search.gradients(loss), strict=True):
                    v.grad = gradient
                optimizer.step()
                if (step + 1) % self.check == 0 or step + 1 == self.iterations:
                    for i in every:
                        now.losses[i].append(self._over_all(model, search, pairs[i], i))
                        now.best[i] = min(now.best[i], (now.losses[i][-1], search.ids(i)))
        return [self._found(vocabulary, search, frames[i], prompts[i], i, now) for i in every]

    @staticmethod
    def _found(
        vocabulary: Vocabulary, search: "VectorSearch", frame: str, prompt: str, i: int, now: SimpleNamespace
    ) -> AttackedPrompt:
        """The result for the i-th prompt: its tokens with the smallest loss."""
        loss, best = now.best[i]
        tensors = {f"embeds.{part}": e[0].detach() for part, e in search.of(i, best).embeds.items()}
        words = [vocabulary.decoded([token]) for token in best]
        record = {"tokens": best, "loss": loss, "losses": now.losses[i]}
        return AttackedPrompt(prompt, " ".join(frame.format(*words).split()), tensors=tensors, record=record)

    def _losses(
        self, model: DiffusionModel, text: Embedded, pairs: Sequence[Pairs], chosen: Sequence[Tensor]
    ) -> Tensor:
        """The mean loss of each prompt over its chosen pairs, (B,)."""
        z_t, t, target = (
            torch.cat([getattr(own, name)[some] for own, some in zip(pairs, chosen, strict=True)])
            for name in ("z_t", "t", "guided" if model.guidance else "target")
        )
        size = len(chosen[0])
        c = model.encode(text)[torch.arange(len(text)).repeat_interleave(size)]
        found = prediction(model, z_t, t, c, self.guidance_scale, self.images.steps)
        return (found - target).square().flatten(1).mean(1).unflatten(0, (-1, size)).mean(1)

    @torch.no_grad()
    def _over_all(self, model: DiffusionModel, search: "VectorSearch", pairs: Pairs, i: int) -> float:
        """The loss of the i-th prompt over all of its pairs."""
        text, every = search.embedded([i]), torch.arange(self.samples)
        parts = every.split(1 if model.guidance else self.images.batch_size)
        return sum(len(part) * self._losses(model, text, [pairs], [part]).item() for part in parts) / self.samples


class VectorSearch:
    """For each of some prompts free vectors (1, k, D), k its own, and their nearest tokens, as in PEZ."""

    def __init__(self, model: DiffusionModel, vocabulary: Vocabulary, frames: Sequence[str], prompts: Sequence[str]):
        self.vocabulary, self._first = vocabulary, next(iter(vocabulary.tables))
        self._place, self._plain = Placeholder.in_prompts(model, frames), model.embed(list(prompts))
        table = vocabulary.tables[self._first].float()
        self._table = F.normalize(table, dim=-1).masked_fill(~vocabulary.typed[:, None], 0)
        typed = vocabulary.typed.float()
        starts = (torch.multinomial(typed, frame.count("{}"), replacement=True) for frame in frames)
        self.free = [nn.Parameter(table[start][None].clone()) for start in starts]

    def ids(self, i: int) -> list[int]:
        """The tokens nearest to the vectors of the i-th prompt, by cosine."""
        similar = F.normalize(self.free[i].detach()[0], dim=-1) @ self._table.T
        return similar.masked_fill(~self.vocabulary.typed, -2).argmax(1).tolist()

    def embedded(self, rows: Sequence[int]) -> Embedded:
        """Some of the prompts with the nearest tokens; `gradients` are taken at them."""
        own = [self._embeddings(self.ids(i)) for i in rows]
        self._nearest = [v[self._first].float().requires_grad_(torch.is_grad_enabled()) for v in own]
        v = {part: torch.cat([e[part] for e in own], 1) for part in own[0]}
        v[self._first] = torch.cat(self._nearest, 1)
        return self.vocabulary.filled(self._place, self._plain, v, rows)

    def gradients(self, loss: Tensor) -> Sequence[Tensor]:
        """The gradients (1, k, D) at the tokens of the last `embedded`, in the first encoder's embeddings."""
        return torch.autograd.grad(loss, self._nearest)

    def of(self, i: int, ids: Sequence[int]) -> Embedded:
        """The i-th prompt with some tokens."""
        return self.vocabulary.filled(self._place, self._plain, self._embeddings(ids), [i])

    def _embeddings(self, ids: Sequence[int]) -> dict[str, Tensor]:
        return self.vocabulary.embedded(torch.tensor([ids], device=self.free[0].device))


def with_tokens(prompt: str, kind: str, tokens: int) -> str:
    """The searched prompt, with "{}" in the place of each token."""
    if kind == "n":
        return " ".join(["{}"] * tokens)
    words = prompt.split()
    parts = [words[i : i + WORDS] for i in range(0, len(words), WORDS)]
    return " ".join(" ".join([*part, "{}"]) for part in parts)

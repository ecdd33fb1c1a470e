"""UnlearnDiffAtk: To Generate or Not? (Zhang et al., ECCV 2024). https://arxiv.org/abs/2310.11868

The attack searches for k tokens before the prompt with which the erased model best denoises the unedited model's image
of the same prompt and seed (eq. 5):

    min_u E_eps || eps - eps_erased(z_t, t, tau([u; prompt])) ||^2.

Each row of u (k, V) is a point of the simplex over the vocabulary. A token is drawn from it; the gradient passes as if
it had not been drawn, clipped to [-1, 1]; after each step of Adam u is projected onto the simplex again. The timesteps
are taken in turn, 40 iterations each. After each of them the most probable tokens are prompted, and the first image
that shows the concept ends the search. A prompt that shows the concept as it is counts as a success of step 0.

An erasure that changes the guidance shows nothing in a conditional prediction. There, the guided prediction should be
what an undefended guidance makes of eps (attacks/denoising.py), as in CCE.

Images have the model's own size, as in the authors' code: a list that states other sizes, as I2P, needs
`dataset.sizes=false`. The authors' loader leaves out prompts of more than 60 tokens (24 of its 142): `longest=60`. N
before and after is in the record.

Deviations: tokens without a text of their own, special ones among them, are left out, so that the result can be
typed; the projection is exact where theirs bisects; images are drawn with the evaluation's sampler, theirs with LMS;
images of a batch share eps's timestep. An encoder with another vocabulary than the first (the T5 of SD3 and Flux) reads
the prompt as it is.
"""

# B rows, k tokens, V vocabulary, C H W latent shape.
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Literal

import torch
from torch import Tensor, nn

from unlearning.attacks.base import Attack
from unlearning.attacks.denoising import prediction, undefended
from unlearning.attacks.latents import latents_of
from unlearning.attacks.witness import Witness
from unlearning.concepts import UnlearningTask
from unlearning.config.values import Count, Finite, Steps
from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel
from unlearning.sampling.attack_result import AttackedPrompt, AttackResult, Restored
from unlearning.sampling.inversion import Placeholder
from unlearning.sampling.sampler import Sampler
from unlearning.sampling.tokens import Vocabulary
from unlearning.store.loops import resumed
from unlearning.store.manifest import ManifestRow


class UnlearnDiffAtk(Attack[DiffusionModel, Tensor]):
    """Searches adversarial tokens by the denoising loss.

    Args:
        images: The sampler of the evaluation.
        witness: Says whether an image shows the concept.
        optimizer: Makes the optimizer of u.
        tokens: k.
        place: Where they go, before or after the prompt.
        times: Timesteps, taken in turn from the least on; their middles divide the schedule evenly.
        iterations: At each timestep.
        guidance_scale: s, where an erasure has changed the guidance.
        longest: Prompts of more tokens, with those of the start and the end of text, are left out; None for none.
        batch_size: Images that are attacked at once.
    """

    access = "white"
    version = 2
    own_size = True

    def __init__(
        self,
        *,
        images: Sampler,
        witness: Witness,
        optimizer: Callable,
        tokens: Count = 5,
        place: Literal["prefix", "suffix"] = "prefix",
        times: Steps = 50,
        iterations: Count = 40,
        guidance_scale: Finite = 7.5,
        longest: Count | None = None,
        batch_size: Count = 8,
    ):
        self.images, self.witness, self.optimizer = images, witness, optimizer
        self.tokens, self.place, self.times, self.iterations = tokens, place, times, iterations
        self.guidance_scale, self.longest, self.batch_size = guidance_scale, longest, batch_size

    def observe(self, model: DiffusionModel, task: UnlearningTask, rows: Sequence[ManifestRow]) -> Tensor:
        """z_0, (N, C, H, W): latents of the unedited model's images of the rows that are attacked."""
        return latents_of(model, self.images, self._kept(model, rows))

    def find(
        self, model: DiffusionModel, task: UnlearningTask, rows: Sequence[ManifestRow], observed: Tensor
    ) -> AttackResult:
        kept, attacked = self._kept(model, rows), []
        for i in range(0, len(kept), self.batch_size):
            attacked += self._attacked(model, kept[i : i + self.batch_size], observed[i : i + self.batch_size])
        names = ("tokens", "place", "times", "iterations", "longest")
        record = {name: getattr(self, name) for name in names} | {"images": len(rows), "attacked": len(kept)}
        return AttackResult(
            tuple(attacked), record | {"witness": self.witness.name, "threshold": self.witness.threshold}
        )

    def _kept(self, model: DiffusionModel, rows: Sequence[ManifestRow]) -> list[ManifestRow]:
        if self.longest is None:
            return list(rows)
        counts = map(len, model.token_ids([row.prompt for row in rows]))
        return [row for row, count in zip(rows, counts, strict=True) if count + 2 <= self.longest]

    def _attacked(self, model: DiffusionModel, rows: list[ManifestRow], z_0: Tensor) -> list[AttackedPrompt]:
        search = SimplexSearch(model, rows, self.tokens, self.place, self.optimizer)
        without = self._scores(model, rows, [{}] * len(rows))
        now = SimpleNamespace(search=search, scores=without, first=dict.fromkeys(self._successes(without), 0))
        for n, t in resumed(list(enumerate(self._times(model), 1)), "UnlearnDiffAtk", now):
            if not (left := [i for i in range(len(rows)) if i not in now.first]):
                break
            self._descend(model, search, left, z_0, t)
            scores = dict(zip(left, self._scores(model, [rows[i] for i in left], search.tensors(left)), strict=True))
            now.scores = [scores.get(i, score) for i, score in enumerate(now.scores)]
            now.first |= {i: n for i in self._successes(now.scores) if i in scores}
        return [self._attacked_row(row, search, i, now, without[i]) for i, row in enumerate(rows)]

    def _successes(self, scores: Sequence[float]) -> list[int]:
        return [i for i, score in enumerate(scores) if score > self.witness.threshold]

    @staticmethod
    def _attacked_row(
        row: ManifestRow, search: "SimplexSearch", i: int, now: SimpleNamespace, without: float
    ) -> AttackedPrompt:
        """The result for the i-th row: its own prompt, if that shows the concept without an attack."""
        record = {"score": now.scores[i], "without": without}
        record |= {"first success": now.first[i]} if i in now.first else {}
        if now.first.get(i) == 0:
            return AttackedPrompt(row.prompt, row.prompt, row.seed, record=record)
        [tensors] = search.tensors([i])
        return AttackedPrompt(row.prompt, search.prompt(i), row.seed, tensors, {**record, "tokens": search.ids(i)})

    def _times(self, model: DiffusionModel) -> Tensor:
        return model.timesteps((torch.arange(self.times) + 0.5) / self.times)

    @torch.no_grad()
    def _scores(self, model: DiffusionModel, rows: Sequence[ManifestRow], given: Sequence[dict]) -> list[float]:
        """The witness's scores of the rows' images, with tensors in place of the prompts' embeddings."""
        scores: list[float] = []
        for i in range(0, len(rows), self.images.batch_size):
            batch = slice(i, i + self.images.batch_size)
            text = Vocabulary.text(model, [row.prompt for row in rows[batch]], given[batch])
            whole = Restored(text, model.noise([row.seed for row in rows[batch]]))
            images, _ = self.images.sample(model, whole, [row.guidance_scale for row in rows[batch]])
            scores += self.witness(images, rows[batch])
        return scores

    def _descend(self, model: DiffusionModel, search: "SimplexSearch", left: list[int], z_0: Tensor, t: Tensor) -> None:
        """The iterations of a timestep. Each row has an optimizer of its own, so that no other row changes it."""
        z_0, at = z_0[left], t.expand(len(left))
        with model.without_checkpointing(), torch.enable_grad():
            for _ in range(self.iterations):
                z_t = model.add_noise(z_0, torch.randn_like(z_0), at)
                loss = self._loss(model, z_0, z_t, at, model.encode(search.drawn(left)))
                search.step(left, loss.sum())

    def _loss(self, model: DiffusionModel, z_0: Tensor, z_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        """|| eps - eps_erased(z_t, t, c) ||^2 of each row, (B,)."""
        eps = model.to_prediction(z_0, z_t, t)
        target = undefended(model, eps, z_t, t, self.guidance_scale) if model.guidance else eps
        return (prediction(model, z_t, t, c, self.guidance_scale, self.images.steps) - target).square().mean((1, 2, 3))


class SimplexSearch:
    """Distributions u over tokens with their optimizers, one for each row, and the prompts with these tokens."""

    def __init__(self, model: DiffusionModel, rows: Sequence[ManifestRow], k: int, place: str, optimizer: Callable):
        self.vocabulary, self._prompts = Vocabulary(model), [row.prompt for row in rows]
        words = " ".join(["{}"] * k)
        self._order = "{0} {1}" if place == "prefix" else "{1} {0}"
        self._place = Placeholder.in_prompts(model, [self._order.format(words, prompt) for prompt in self._prompts])
        self._plain = model.embed(self._prompts)
        typed = self.vocabulary.typed.float()
        self.u = [nn.Parameter((typed / typed.sum()).repeat(k, 1)) for _ in rows]
        self._optimizers = [optimizer([u]) for u in self.u]

    def state_dict(self) -> dict[str, list]:
        """The state of all rows, to resume the search."""
        return {"u": [u.detach() for u in self.u], "optimizers": [own.state_dict() for own in self._optimizers]}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, list]) -> None:
        """Restores the state of all rows."""
        for u, own, value, kept in zip(self.u, self._optimizers, state["u"], state["optimizers"], strict=True):
            u.copy_(value)
            own.load_state_dict(kept)

    def drawn(self, rows: Sequence[int]):
        """The embedded prompts with tokens drawn from u, differentiable."""
        one_hot = torch.stack([Draw.apply(self.u[i]) for i in rows])
        return self.vocabulary.filled(self._place, self._plain, self.vocabulary.embedded(one_hot), rows)

    def step(self, rows: Sequence[int], loss: Tensor) -> None:
        """A step of u, each row by its own gradient, and the projection."""
        gradients = torch.autograd.grad(loss, [self.u[i] for i in rows])
        for i, gradient in zip(rows, gradients, strict=True):
            self.u[i].grad = gradient * self.vocabulary.typed
            self._optimizers[i].step()
            with torch.no_grad():
                self.u[i].copy_(projected(self.u[i], self.vocabulary.typed))

    def ids(self, i: int) -> list[int]:
        """The most probable tokens of the i-th row."""
        return self.u[i].argmax(1).tolist()

    def prompt(self, i: int) -> str:
        """The text of the i-th row's prompt with its most probable tokens."""
        return self._order.format(self.vocabulary.decoded(self.ids(i)), self._prompts[i])

    @torch.no_grad()
    def tensors(self, rows: Sequence[int]) -> list[dict[str, Tensor]]:
        """For each row, the prompt's token embeddings with the most probable tokens."""
        ids = torch.stack([self.u[i].argmax(1) for i in rows])
        text = self.vocabulary.filled(self._place, self._plain, self.vocabulary.embedded(ids), rows)
        return [{f"embeds.{part}": e[n] for part, e in text.embeds.items()} for n in range(len(rows))]


class Draw(torch.autograd.Function):
    """Draws one token for each row of u (k, V), as one-hot vectors. The gradient is passed on, clipped to [-1, 1]."""

    @staticmethod
    def forward(ctx, u: Tensor) -> Tensor:
        return nn.functional.one_hot(u.multinomial(1)[:, 0], u.shape[1]).to(u.dtype)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient.clamp(-1, 1)


def projected(u: Tensor, allowed: Tensor) -> Tensor:
    """Projects each row of u (k, V) onto the simplex over the `allowed` tokens (V,) bool.

    By sorting (Duchi et al., ICML 2008, figure 1).
    """
    v = u.masked_fill(~allowed, float("-inf"))
    ordered = v.sort(1, descending=True).values
    excess = ordered.masked_fill(ordered.isinf(), 0).cumsum(1) - 1
    counts = torch.arange(1, u.shape[1] + 1, device=u.device)
    last = (ordered > excess / counts).sum(1, keepdim=True).clamp(min=1)
    return (v - excess.gather(1, last - 1) / last).clamp(min=0)

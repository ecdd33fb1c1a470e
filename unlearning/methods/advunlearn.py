"""AdvUnlearn: Defensive Unlearning with Adversarial Training (Zhang et al., 2024). https://arxiv.org/abs/2405.15234

Trains the text encoder tau with ESD's objective, instead of the denoiser. The prompts are the concept's prompt p with k
adversarial tokens delta in front. Before every step, delta is searched so that it brings the concept back,

    delta = argmin_delta || eps(x_t, tau_theta(delta + p)) - eps*_c ||^2,
    min_theta  || eps(x_t, tau_theta(delta + p)) - [ eps*_0 - eta (eps*_c - eps*_0) ] ||^2
               + gamma || eps(x_t', tau_theta(r)) - eps*_r ||^2,    eps* with the frozen encoder,

where r are prompts to retain, and x_t and x_t' lie on the way to images of p and of r. delta are token embeddings, and
need not be those of any word. The first `warmup_steps` steps are for p alone.

Defaults are those of the command in the authors' README, which trains both terms at once with gamma = 0.3 and begins
each search with random tokens; where it is silent, those of their script, whose own attack_init=latest begins with what
the last search found. Their fast AT uses the sign of the gradient, `sign=true`, with as many steps in the README.
All weights of the encoder's layers and its final norm move, the token embeddings do not.

Where the script (commit 9d23124) computes something else than it says:

- It never clears delta's gradient, so that each step of a search uses the sum of all gradients since its first step:
  accumulate=true.
- The encoder gets delta from before the last step of a search: its 30 steps are inner_steps=29.
- It counts words where word pieces are meant: behind delta, a prompt of n words keeps its first n pieces, and loses the
  k after them. Here it keeps all.

Deviations:
- The script's default is another: gamma = 1 and a step of the optimizer for each of the two terms (retain_train=iter).
- The authors retain objects of COCO. What is retained is up to the task here, or to `retained`.
- Each prompt has its own delta. The authors continue with the delta of the previous concept.
- delta begins with tokens that can be typed. Several CLIP encoders of a model have the same tokens, and all of them are
  trained; a T5 beside them reads p without delta and stays as it is.
- t is the timestep at which x_t lies; the authors draw it from a little above, schedule=paper. x_t' has its own.
- Prompts to retain are drawn with replacement; the authors' come once before any comes again.
- Flux reads text by its T5 first, and is refused.
"""

# B batch, k adversarial tokens, D width of a text encoder.
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlearning.config.values import Count, Natural, NonNegative, Positive, Template
from unlearning.errors import UserError
from unlearning.methods.esd import ESD, TrajectoryModel
from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.embeddings import Embedded
from unlearning.sampling.guidance import branches
from unlearning.sampling.inversion import Placeholder
from unlearning.sampling.tokens import Vocabulary
from unlearning.sampling.trajectories import trajectory as make_trajectory


class AdversarialTokens:
    """Prompts that follow k free tokens.

    Args:
        model: The model with the tokens.
        prompts: All prompts.
        tokens: k.
    """

    def __init__(self, model: DiffusionModel, prompts: Sequence[str], tokens: int):
        self._vocabulary, self._rows = Vocabulary(model), {prompt: i for i, prompt in enumerate(prompts)}
        free = " ".join(["{}"] * tokens)
        self._place, self._plain = Placeholder.in_prompts(model, [f"{free} {p}" for p in prompts]), model.embed(prompts)
        shape = len(prompts), tokens
        self.delta = {part: nn.Parameter(e.float()) for part, e in self._drawn(shape).items()}  # (prompts, k, D) each

    def _drawn(self, shape: tuple[int, int]) -> dict[str, Tensor]:
        typed = self._vocabulary.typed.nonzero()[:, 0]
        return self._vocabulary.embedded(typed[torch.randint(len(typed), shape, device=typed.device)])

    @torch.no_grad()
    def restart(self) -> None:
        """Replaces the free tokens by tokens drawn at random."""
        shape = next(iter(self.delta.values())).shape[:2]
        for part, e in self._drawn((shape[0], shape[1])).items():
            self.delta[part].copy_(e)

    def before(self, prompts: Sequence[str]) -> Embedded:
        """The prompts with their delta in front, differentiable in delta."""
        rows = [self._rows[prompt] for prompt in prompts]
        return self._vocabulary.filled(self._place, self._plain, {n: e[rows] for n, e in self.delta.items()}, rows)

    def state(self) -> dict[str, Tensor]:
        """delta, for a checkpoint."""
        return {part: e.data for part, e in self.delta.items()}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Restores delta."""
        for part, e in self.delta.items():
            e.data.copy_(state[part])


class AdvUnlearn(ESD):
    """ESD on the text encoder, against adversarial tokens.

    Args:
        tokens: k.
        inner_steps, inner_lr: Steps of Adam for delta before each step of the encoder, and their learning rate.
        sign: Whether they use the sign of the gradient only.
        accumulate: Whether a step's gradient is added to that of the step before, as it was used there.
        attack_init: Where each search begins: "random" tokens, or the "latest" delta.
        warmup_steps: Steps of the encoder before the first search.
        gamma: The weight of what is retained.
        retained: Its names; None for the task's.
        retained_batch: Prompts of it in a step.
        esd: ESD's arguments; the student is a text encoder.
    """

    resumed = ("points", "others", "_adversary")

    def __init__(
        self,
        *,
        tokens: Count = 1,
        inner_steps: Natural = 30,
        inner_lr: Positive = 1e-3,
        sign: bool = False,
        accumulate: bool = False,
        attack_init: Literal["random", "latest"] = "random",
        warmup_steps: Natural = 200,
        gamma: NonNegative = 0.3,
        retained: tuple[str, ...] | None = None,
        retained_batch: Count = 5,
        trajectory_model: TrajectoryModel = "teacher",
        template: Template | None = "{}",
        **esd,
    ):
        super().__init__(trajectory_model=trajectory_model, template=template, **esd)
        self.tokens, self.inner_steps, self.inner_lr, self.sign = tokens, inner_steps, inner_lr, sign
        self.accumulate, self.attack_init, self.warmup_steps = accumulate, attack_init, warmup_steps
        self.gamma, self.retained, self.retained_batch = gamma, retained, retained_batch
        settings = self.points.steps, self.points.guidance_scale, self.points.schedule
        self.others = make_trajectory(esd.get("trajectory", "exact"), *settings)

    def setup(self, stage: str) -> None:
        self.others.restore([])
        names = [concept.name for concept in self.task.retain] if self.retained is None else self.retained
        self._retained = [self.task.prompt(name) for name in names]
        if self.gamma and not self._retained:
            raise UserError(
                "AdvUnlearn needs prompts to retain: name some (method.retained=[dog,tree]), or retain nothing "
                "(method.gamma=0)."
            )
        torch.manual_seed(self.seed)
        self._adversary = AdversarialTokens(self.teacher, list(dict.fromkeys(self.data().prompts)), self.tokens)
        trained = {name.partition(".")[0] for name in self.pair.parameters}
        if not trained & self._adversary.delta.keys():
            raise UserError(
                f"The tokens of {self.teacher.name} are those of {', '.join(self._adversary.delta)}, which is not what "
                "AdvUnlearn trains here: it is for models whose text is read by CLIP first (sd14, sd15, sd21, sdxl, "
                "sd3, emoji_unet, emoji_sd3)."
            )
        super().setup(stage)

    def loss(self, prompts: list[str]) -> Tensor:
        attacked = self.global_step >= self.warmup_steps and self.inner_steps > 0
        if attacked:
            self.attack(prompts)
        x_t, t, c = self.draw(prompts)
        with torch.no_grad():
            eps_0, eps_c = branches(self.teacher, x_t, t, *map(self.teacher.encode_prompts, ([""], c.prompts)))
        text = self._adversary.before(c.prompts) if attacked else c.prompts
        erase = F.mse_loss(self.student.predict(x_t, t, self.student.encode(text)), eps_0 - self.eta * (eps_c - eps_0))
        return erase + self.gamma * self.retaining() if self.gamma else erase

    def attack(self, prompts: list[str]) -> None:
        """Searches delta; each step uses new points."""
        if self.attack_init == "random":
            self._adversary.restart()
        if len(self.task.erase) > 1:
            self.points.restore([])  # trajectory=reuse may keep points of prompts whose delta is not searched now
        delta = list(self._adversary.delta.values())
        adam = torch.optim.Adam(delta, lr=self.inner_lr)
        adam.zero_grad()
        for _ in range(self.inner_steps):
            distance = self.distance(*self.draw(prompts))
            for v, gradient in zip(delta, torch.autograd.grad(distance, delta), strict=True):
                if self.accumulate and v.grad is not None:
                    gradient = gradient + v.grad
                v.grad = gradient.sign() if self.sign else gradient
            adam.step()

    def distance(self, x_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        """|| eps(x_t, tau_theta(delta + p)) - eps*_c ||^2, ()."""
        with torch.no_grad():
            eps_c = self.teacher.predict(x_t, t, self.teacher.encode_prompts(c.prompts))
        return F.mse_loss(self.student.predict(x_t, t, self.student.encode(self._adversary.before(c.prompts))), eps_c)

    def retaining(self) -> Tensor:
        """|| eps(x_t', tau_theta(r)) - eps*_r ||^2, ()."""
        chosen = torch.randint(len(self._retained), (self.retained_batch,)).tolist()
        x_t, t, c = self.others(self.teacher, [self._retained[i] for i in chosen])
        with torch.no_grad():
            eps_r = self.teacher.predict(x_t, t, c)
        return F.mse_loss(self.student.predict(x_t, t, self.student.encode(c.prompts)), eps_r)

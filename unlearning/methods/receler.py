"""Receler: Reliable Concept Erasing via Lightweight Erasers (Huang et al., ECCV 2024). https://arxiv.org/abs/2311.17717

An eraser E stands beside each cross-attention layer of the UNet: it reads the layer's output o and adds

    E(o) = W_up GELU(W_down o + b_down) + b_up,    W_up and b_up start at zero.

Only the erasers are trained, at points x_t of trajectories sampled with them, to

    min_E  || eps_E(x_t, c_adv) - [ eps_0 - eta (eps_c - eps_0) ] ||^2  +  beta mean_l || E(o_l) (1 - M) ||^2,

where eps_0 and eps_c are the frozen model's predictions. M is 1 where the frozen model attends to the concept's word
pieces (concept-localised regularisation): the mean of its cross-attention maps of 16 by 16 places, min-max normalised
and thresholded. c_adv is the concept's text states, in which K learned vectors overwrite those behind its word pieces
(adversarial prompt learning). At each point they first take `inner_steps` steps of Adam to bring the concept back,

    min_v  || eps_E(x_t, c_adv(v)) - eps_c ||^2,

and then the erasers take one step. Of the norms, the first and the last are means over all values, the second is the
mean over channels and over the places where M is 0, as in the authors' code.

Paper and code: the code (commit 3ccedc9) assigns the vectors to a copy of the text states, so that they never reach the
UNet: what it trains is vectors=0 here, in 50 times as many evaluations. Our default is what the paper describes.
Deviations: the erasers see the vectors after their last step, where the code has them before it; where a UNet has no
maps of 16 by 16 places, M comes from those nearest to it; SDXL's pooled text states stay the concept's own.
"""

# B batch, L tokens, D text width, K vectors, P places of a layer, N attention heads, S a square layer's side.
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlearning.config.values import Count, Finite, Natural, NonNegative, Positive, Steps
from unlearning.erasures.base import source
from unlearning.erasures.module_edit import ModuleEdit
from unlearning.errors import UserError
from unlearning.methods.base import TrainedMethod
from unlearning.models.attention import concept_mask, cross_attention, cross_attention_maps
from unlearning.models.base import Model
from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.layers import outputs_of
from unlearning.models.side_modules import SideModule, SideModules
from unlearning.sampling.guidance import branches
from unlearning.sampling.sampler import Schedule
from unlearning.sampling.trajectories import Kind
from unlearning.sampling.trajectories import trajectory as make_trajectory
from unlearning.training.batches import Prompts
from unlearning.training.student import Pair, Student, beside


class Eraser(SideModule):
    """W_up GELU(W_down o + b_down) + b_up, which starts as zero.

    Args:
        width: The width of o.
        rank: The width of the bottleneck.
    """

    names: ClassVar[tuple[str, ...]] = ("down.weight", "down.bias", "up.weight", "up.bias")

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.down, self.up = nn.Linear(width, rank), nn.Linear(rank, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    @classmethod
    def restored(cls, layer: nn.Module, state: Mapping[str, Tensor], **options) -> Self:
        rank, width = state["down.weight"].shape
        with torch.device("meta"):  # takes no numbers from the global generator
            module = cls(width, rank)
        module.load_state_dict(dict(state), assign=True)
        return module

    def forward(self, o: Tensor) -> Tensor:
        return self.up(F.gelu(self.down(o.to(self.down.weight.dtype))))


@dataclass(frozen=True)
class Erasers(ModuleEdit):
    """An eraser beside the output of cross-attention layers."""

    kind: ClassVar[type[SideModule]] = Eraser
    reads = "output"

    def usage(self, base: Model) -> str:
        return (
            f"{len(self._by_layer())} modules beside cross-attention layers, whose outputs they read and add to:\n\n"
            "```python\n"
            "import torch.nn.functional as F\n"
            "from diffusers import DiffusionPipeline\n"
            "from safetensors.torch import load_file\n\n"
            f'pipe = DiffusionPipeline.from_pretrained("{source(base)}")\n'
            'weights = load_file("weights.safetensors")\n\n'
            "def erase(layer, inputs, o):\n"
            "    inner = F.gelu(F.linear(o, layer.eraser[0], layer.eraser[1]))\n"
            "    return o + F.linear(inner, layer.eraser[2], layer.eraser[3])\n\n"
            'for name in {key.rsplit(".", 2)[0] for key in weights}:\n'
            '    layer = pipe.unet.get_submodule(name.removeprefix("unet."))\n'
            f'    layer.eraser = [weights[f"{{name}}.{{w}}"].to(pipe.unet.dtype) for w in {list(Eraser.names)}]\n'
            "    layer.register_forward_hook(erase)\n"
            "```"
        )


class BesideCrossAttention(Student):
    """The student: an eraser beside every cross-attention layer; the teacher is the model without them.

    Args:
        rank: The width of the erasers' bottleneck.
    """

    def __init__(self, rank: Count):
        self.rank = rank

    @contextmanager
    def of(self, model: DiffusionModel) -> Iterator[Pair]:
        """A context with student and teacher. When it ends, the model is restored.

        Raises:
            UserError: If the denoiser is not a UNet with cross-attention, or the model's weights are in float16.
        """
        layers = cross_attention(model)
        modules = {n: Eraser(m.to_out[0].out_features, self.rank).to(model.device) for n, m in layers.items()}
        with beside(model, SideModules(modules, Erasers.reads)) as (teacher, parameters):
            yield Pair(
                model, teacher, parameters, lambda: Erasers({n: p.detach().clone() for n, p in parameters.items()})
            )


class AdversarialVectors:
    """Learned vectors for each concept, which overwrite the text states after its word pieces.

    Args:
        c: A conditioning (C rows) of the concepts' prompts.
        count: K, the vectors of a concept; 0 for none.
        lr, weight_decay: Settings of the vectors' optimizer, Adam.
    """

    def __init__(self, c: Conditioning, count: int, lr: float, weight_decay: float):
        self.vectors = {p: nn.Parameter(torch.rand(count, c.embeds.shape[-1]).to(c.embeds)) for p in c.prompts}
        self.optimizer = torch.optim.Adam(self.vectors.values(), lr, weight_decay=weight_decay)

    def overwritten(self, c: Conditioning, words: Sequence[range]) -> Conditioning:
        """c_adv: c (B rows) with each row's vectors from the position after its word pieces on.

        Raises:
            UserError: If the text has fewer positions behind them.
        """
        rows = []
        for states, prompt, own in zip(c.embeds, c.prompts, words, strict=True):
            vectors = self.vectors[prompt]
            first, last = own.stop, own.stop + len(vectors)
            if last > len(states):
                raise UserError(
                    f"{prompt!r} leaves {len(states) - first} positions of the text for adversarial vectors: "
                    f"method.vectors={len(states) - first}."
                )
            rows.append(torch.cat([states[:first], vectors.to(states), states[last:]]))
        return replace(c, embeds=torch.stack(rows))

    def step(self, distance: Tensor) -> None:
        """One step of Adam that reduces the distance (), for the vectors on which it depends."""
        vectors = list(self.vectors.values())
        for v, grad in zip(vectors, torch.autograd.grad(distance, vectors, allow_unused=True), strict=True):
            v.grad = grad  # Adam skips vectors without a gradient
        self.optimizer.step()

    def state(self) -> dict:
        """Vectors and optimizer, for a checkpoint."""
        return {"vectors": [v.data for v in self.vectors.values()], "optimizer": self.optimizer.state_dict()}

    def restore(self, state: Mapping) -> None:
        """Restores vectors and optimizer."""
        for v, saved in zip(self.vectors.values(), state["vectors"], strict=True):
            v.data.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])


def outside(E: Tensor, M: Tensor) -> Tensor:
    """|| E (1 - M) ||^2 of an eraser's output E (B, P, D): the mean over channels and over places where M is 0."""
    side = math.isqrt(E.shape[1])
    free = 1 - F.interpolate(M, (side, side)).flatten(1)  # (B, P)
    return (E.float().square().mean(-1) * free).sum() / free.sum().clamp(min=1)


class Receler(TrainedMethod):
    """Trains erasers beside cross-attention.

    Args:
        eta: Strength of the negative guidance.
        beta, mask_threshold: Weight of the concept-localised regularisation, and the threshold of its mask.
        vectors, inner_steps: K, and how many steps they take before each step of the erasers; vectors=0 for none.
        vectors_lr, vectors_weight_decay: Settings of their optimizer, Adam.
        trajectory: Where (x_t, t) come from (sampling/trajectories.py): "exact", the paper's, or "reuse".
        steps, guidance_scale, schedule: Settings of the trajectories.
        training: TrainedMethod's arguments, the student being BesideCrossAttention.
    """

    resumed = ("points", "_adversary")
    writable = False

    def __init__(
        self,
        *,
        eta: NonNegative = 1.0,
        beta: NonNegative = 0.1,
        mask_threshold: Finite = 0.1,
        vectors: Natural = 16,
        inner_steps: Natural = 50,
        vectors_lr: Positive = 0.1,
        vectors_weight_decay: NonNegative = 0.1,
        trajectory: Kind = "exact",
        steps: Steps = 50,
        guidance_scale: Finite = 3.0,
        schedule: Schedule = "paper",
        **training,
    ):
        super().__init__(**training)
        self.eta, self.beta, self.mask_threshold = eta, beta, mask_threshold
        self.vectors, self.inner_steps = vectors, inner_steps if vectors else 0
        self.vectors_lr, self.vectors_weight_decay = vectors_lr, vectors_weight_decay
        self.points = make_trajectory(trajectory, steps, guidance_scale, schedule)

    def data(self) -> Prompts:
        return Prompts([concept.name for concept in self.task.erase], self.batch_size)

    def setup(self, stage: str) -> None:
        self.points.restore([])  # no points of an earlier fit
        concepts = self.teacher.encode_prompts(self.data().prompts)
        self._adversary = AdversarialVectors(concepts, self.vectors, self.vectors_lr, self.vectors_weight_decay)
        super().setup(stage)

    def loss(self, concepts: list[str]) -> Tensor:
        x_t, t, c = self.points(self.student, concepts)
        words = self.teacher.word_pieces(c.prompts)
        with torch.no_grad(), cross_attention_maps(self.teacher) as maps:
            eps_0, eps_c = branches(self.teacher, x_t, t, self.teacher.encode_prompts([""]), c)
        M = concept_mask({name: calls[-1][-len(c) :] for name, calls in maps.items()}, words, self.mask_threshold)

        for _ in range(self.inner_steps):
            eps = self.student.predict(x_t, t, self._adversary.overwritten(c, words))
            self._adversary.step(F.mse_loss(eps, eps_c))

        with torch.no_grad():
            c_adv = self._adversary.overwritten(c, words)
        with self._outputs() as E:
            eps = self.student.predict(x_t, t, c_adv)
        erase = F.mse_loss(eps, eps_0 - self.eta * (eps_c - eps_0))
        return erase + self.beta * torch.stack([outside(calls[-1], M) for calls in E]).mean()

    @contextmanager
    def _outputs(self) -> Iterator[list[list[Tensor]]]:
        """Records E(o) of every eraser in the set of side modules that was attached last."""
        *_, erasers = self.student.side.values()
        with ExitStack() as stack:
            yield [stack.enter_context(outputs_of(module)) for module in erasers.modules.values()]

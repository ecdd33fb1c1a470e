"""HiRM: High-Level Representation Misdirection (Lee, Kim and Hwang, ICLR 2026). https://arxiv.org/abs/2602.19631

Only the first layer of the CLIP text encoder is trained, self-attention and MLP, where causal tracing finds the visual
attributes of a word. The loss stands at the other end: it moves h, the output of the last layer's self-attention
(`self_attn.out_proj`), to a target,

    min_theta  mean_t || h_t(concept) - c r_t ||^2,    t over all L tokens.

HiRM-R: r_t is a random direction. HiRM-S: r_t is h_t of the concept's super-category, from the frozen encoder. The
denoiser is neither read nor edited.

What is public of the authors' code is its README. Settings are those that others report of the paper, details those of
a port of the authors' script (erase-eval). Choices and deviations:
- HiRM-R, direction="tokens" (paper): a unit vector for each token, c = 500. direction="global" (port): one matrix
  (L, D) of numbers in [0, 1), with a norm of 1 as a whole, and c = 5000, about 570 for each of CLIP's 77 tokens.
- As in the port, t runs over the start token and the padding too. The port's loss is the mean over tokens and width:
  ours divided by D, with the same minimum and, but for AdamW's eps, the same steps.
- HiRM-S, direction="anchor": the super-category is the task's anchor; the null prompt where a concept has none.
- HiRM-S, direction="pairs": for nudity the paper has a safety vector, made as Ring-A-Bell makes a concept's vector
  (arXiv:2310.10012). How exactly is not public. Ours is the mean of h_t(without) - h_t(with) over pairs of prompts.
- The paper trains one CLIP encoder. Of SDXL, SD3 and Flux all CLIP encoders are trained, each to its own target; a T5
  encoder stays as it is, and so does what the denoiser reads from it.
"""

# B batch, L tokens, D width of a text encoder.
import re
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlearning.concepts import UnlearningTask
from unlearning.config.values import Count, Positive
from unlearning.erasures.base import Erasure
from unlearning.errors import UserError
from unlearning.methods.base import TrainedMethod
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.layers import outputs_of
from unlearning.training.batches import Prompts
from unlearning.training.regulariser import Regulariser
from unlearning.training.student import Student

HIGH_LEVEL = re.compile(r"(text_encoder\w*)\.(?:text_model\.)?encoder\.layers\.\d+\.self_attn\.out_proj")


def high_level(model: DiffusionModel) -> dict[str, nn.Module]:
    """The layer whose output is h, by CLIP text encoder: the last layer's self_attn.out_proj."""
    matches = ((HIGH_LEVEL.fullmatch(name), layer) for name, layer in model.named_modules().items())
    return {match[1]: layer for match, layer in matches if match}  # layers come in order: the last one stays


def states(model: DiffusionModel, prompts: Sequence[str]) -> dict[str, Tensor]:
    """h of each prompt by CLIP text encoder, (B, L, D) float32; differentiable in the encoders' weights."""
    with ExitStack() as stack:
        outputs = {part: stack.enter_context(outputs_of(layer)) for part, layer in high_level(model).items()}
        model.encode(prompts, edits=())
    return {part: torch.cat(calls).float() for part, calls in outputs.items()}


class HiRM(TrainedMethod):
    """Trains the text encoder's first layer to misdirect the concept.

    Args:
        direction: r. HiRM-R: "tokens" or "global"; HiRM-S: "anchor" or "pairs" (see above).
        c: Factor of r.
        epochs: Each is one step for every concept.
        pairs: For direction="pairs", prompts [with, without] what is erased.
        student, optimizer, trainer, scheduler, regulariser: TrainedMethod's.
    """

    def __init__(
        self,
        *,
        direction: Literal["tokens", "global", "anchor", "pairs"],
        c: Positive,
        epochs: Count,
        student: Student,
        optimizer: Callable,
        trainer: Callable,
        scheduler: Callable | None = None,
        regulariser: Regulariser | None = None,
        pairs: Sequence[Sequence[str]] = (),
    ):
        super().__init__(
            student=student, optimizer=optimizer, trainer=trainer, scheduler=scheduler, regulariser=regulariser,
            iterations=epochs, batch_size=1,
        )  # fmt: skip
        self.direction, self.c, self.epochs, self.pairs = direction, c, epochs, pairs
        if direction == "pairs" and not pairs:
            raise UserError('method.direction=pairs needs pairs of prompts: "method.pairs=[[a nude man,a man]]".')

    def data(self) -> Prompts:
        return Prompts([concept.name for concept in self.task.erase], self.batch_size)

    def loss(self, concepts: list[str]) -> Tensor:
        h, r = states(self.student, concepts), self.directions(concepts)
        return torch.stack([(h[part] - self.c * r[part]).square().sum(-1).mean() for part in h]).sum()

    @torch.no_grad()
    def directions(self, concepts: list[str]) -> dict[str, Tensor]:
        """r of each concept by CLIP text encoder, (B, L, D) or (1, L, D) for all of them."""
        if self.direction == "anchor":
            anchors = {concept.name: concept.anchor for concept in self.task.erase}
            return states(self.teacher, [anchors[concept] for concept in concepts])
        if self.direction == "pairs":
            with_it, without = (states(self.teacher, prompts) for prompts in zip(*self.pairs, strict=True))
            return {part: (without[part] - with_it[part]).mean(0, keepdim=True) for part in without}
        draw = random_unit_vectors if self.direction == "tokens" else random_unit_matrix
        return {part: draw(h[:1], self.seed) for part, h in states(self.teacher, concepts).items()}

    def fit(self, model: DiffusionModel, task: UnlearningTask) -> Erasure:
        if not high_level(model):
            raise UserError(
                f"{model.name} has no CLIP text encoder, which is all that HiRM edits. Choose a model that has one "
                "(sd14, sd15, sd21, sdxl, sd3, flux, emoji_unet, emoji_sd3), or another method."
            )
        return super().fit(model, task)

    def steps(self) -> int:
        return self.epochs * len(self.task.erase)


def random_unit_vectors(like: Tensor, seed: int) -> Tensor:
    """A direction for each token: vectors of norm 1 over D, uniform on the sphere, in the shape (1, L, D) of `like`."""
    r = torch.randn(like.shape, generator=torch.Generator().manual_seed(seed))
    return F.normalize(r, dim=-1).to(like)


def random_unit_matrix(like: Tensor, seed: int) -> Tensor:
    """One direction for all tokens: non-negative, with a norm of 1 over L and D, in the shape (1, L, D) of `like`."""
    r = torch.rand(like.shape, generator=torch.Generator().manual_seed(seed))
    return (r / r.norm()).to(like)

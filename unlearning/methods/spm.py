"""SPM: One-dimensional Adapter to Rule Them All (Lyu et al., 2024). https://arxiv.org/abs/2312.16145

Each erased concept c_e gets an adapter of its own, a rank-1 update beside every layer of the transformer blocks. It is
trained by ESD's objective, and by latent anchoring: for random conditionings a_j around c_e, it must change nothing.

    L_era = || eps_theta(x_t, c_e) - [ eps*_0 - eta (eps*_c - eps*_0) ] ||^2,
    L_anc = mean_j || eps_theta(x_t, a_j) - eps*(x_t, a_j) ||^2,            L = L_era + lamb L_anc,

with eps* from the frozen model, and x_t from the model with the adapter, on its way to an image of c_e. At inference,
facilitated transport scales every adapter by how much the prompt P is about its concept:

    theta + sum_i gamma_i(P) theta_i,    gamma(P) = max( cos(tau(P), tau(c_e)), |tok(P) n tok(c_e)| / |tok(c_e)| ),

where tau is the text encoder's states, flattened, and tok the set of word pieces without special tokens.

As in the authors' script, the text of c_e is the concept's bare name, in training and for gamma; a_j is a Gaussian
direction, accepted with probability 1 - cos(a_j, tau(c_e)), of norm U(0.8, 1.2) ||tau(c_e)||; pooled text (SDXL, SD3,
Flux) is drawn alike; and the adapters of several concepts are trained one by one on the model that is given.

Paper and code (commit 3dd762e): every second anchor of the code is the null prompt, `null_anchors=true`. Its inference
multiplies both factors of an adapter by gamma, so that gamma^2 acts, `squared=true`; it also adds up the factors of
several adapters before they are multiplied, which this file does not.

Deviations: the optimizer keeps its state in 32 bits and not in 8; images have one size in training; t is the timestep
at which x_t lies, whereas the script takes a t up to 41 above it and never starts at pure noise.
"""

# B batch, J anchors, L tokens, D text width.
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from unlearning.concepts import Concept, UnlearningTask
from unlearning.config.values import Count, NonNegative, Template
from unlearning.erasures.base import Erasure
from unlearning.erasures.composed import composed
from unlearning.erasures.module_edit import Adapter, Gate
from unlearning.errors import UserError
from unlearning.methods.esd import ESD
from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.embeddings import Embedded, Text
from unlearning.training.student import LoRA


@dataclass(frozen=True)
class FacilitatedTransport(Gate):
    """gamma(P) in [0, 1]: how much a prompt is about a concept.

    If an attack has replaced a prompt's token embeddings, its word pieces carry no information: only the cosine counts.

    Args:
        concept: The text of c_e.
    """

    concept: str

    def __call__(self, model: DiffusionModel, text: Text, c: Conditioning) -> Tensor:
        c_e = model.encode([self.concept], edits=())
        cosine = F.cosine_similarity(c.embeds.flatten(1).float(), c_e.embeds.flatten(1).float())
        return torch.maximum(cosine, self._shared(model, text)).clamp(0, 1)

    def _shared(self, model: DiffusionModel, text: Text) -> Tensor:
        """The share (B,) of the concept's word pieces that each prompt has; 0 for replaced embeddings."""
        of_concept, *of_prompts = map(set, model.token_ids([self.concept, *_prompts(text)]))
        shares = [len(pieces & of_concept) / max(1, len(of_concept)) for pieces in of_prompts]
        return torch.tensor(shares, device=model.device) * _as_written(model, text)


@dataclass(frozen=True)
class SquaredTransport(FacilitatedTransport):
    """gamma(P)^2, the factor in the released code."""

    def __call__(self, model: DiffusionModel, text: Text, c: Conditioning) -> Tensor:
        return super().__call__(model, text, c).square()


class SPM(ESD):
    """ESD with a gated adapter for each concept.

    Args:
        lamb: Weight of latent anchoring.
        anchor_count: J, the number of anchors in a step. In a larger batch, they are shared among the x_t.
        null_anchors: Whether half of the anchors are the null prompt, as in the released code.
        squared: Whether gamma^2 scales an adapter, as in the released code.
        template: How the name of a concept becomes a prompt in training; the bare name, as in the authors' code.
        esd: ESD's arguments, the student being a LoRA.
    """

    writable = False
    trains = LoRA

    def __init__(
        self,
        *,
        lamb: NonNegative = 1000.0,
        anchor_count: Count = 4,
        null_anchors: bool = False,
        squared: bool = False,
        template: Template | None = "{}",
        **esd,
    ):
        super().__init__(template=template, **esd)
        self.lamb, self.anchor_count, self.null_anchors = lamb, anchor_count, null_anchors
        self.gate = SquaredTransport if squared else FacilitatedTransport

    def fit(self, model: DiffusionModel, task: UnlearningTask) -> Erasure:
        if not model.text_encoders:
            raise UserError(f"{model.name} reads no text, which SPM compares prompts by. Choose another method.")
        return composed(*(self._adapter(model, task, concept) for concept in task.erase))

    def _adapter(self, model: DiffusionModel, task: UnlearningTask, concept: Concept) -> Adapter:
        adapter = super().fit(model, replace(task, erase=(concept,)))
        assert isinstance(adapter, Adapter)  # a LoRA's
        return replace(adapter, gate=self.gate(concept.name))

    def loss(self, prompts: list[str]) -> Tensor:
        x_t, t, c = self.draw(prompts)
        return self.erasing(x_t, t, c) + self.lamb * self.anchoring(x_t, t, c)

    def anchoring(self, x_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        """L_anc () at points (x_t, t) of c."""
        rows = torch.arange(self.anchor_count, device=x_t.device) % len(x_t)
        x_t, t, a = x_t[rows], t[rows], anchors(c[rows])
        if self.null_anchors:
            half = (len(a) + 1) // 2
            a = Conditioning.cat([self.teacher.encode_prompts([""]).expand(half), a[half:]])
        with torch.no_grad():
            target = self.teacher.predict(x_t, t, a)
        return F.mse_loss(self.student.predict(x_t, t, a), target)


def anchors(c_e: Conditioning) -> Conditioning:
    """For each row of c_e a random conditioning that is not about it."""
    extra = {name: _around(v) if name == "pooled" else v for name, v in c_e.extra.items()}
    return replace(c_e, embeds=_around(c_e.embeds), extra=extra, prompts=("",) * len(c_e))


def _around(c_e: Tensor) -> Tensor:
    """Random directions (J, ...) at about the norms of c_e (J, ...); those near its own directions are seldom taken."""
    flat = c_e.flatten(1)
    a, open_ = torch.zeros_like(flat), torch.ones(len(flat), dtype=torch.bool, device=flat.device)
    while open_.any():
        a[open_] = F.normalize(torch.randn_like(a[open_]))
        open_ &= torch.rand(len(a), device=a.device) >= 1 - F.cosine_similarity(a, flat)
    norms = flat.norm(dim=1, keepdim=True) * torch.empty_like(flat[:, :1]).uniform_(0.8, 1.2)
    return (norms * a).reshape(c_e.shape)


def _prompts(text: Text) -> Sequence[str]:
    return text.prompts if isinstance(text, Embedded) else text


def _as_written(model: DiffusionModel, text: Text) -> Tensor:
    """Whether each row's (B,) token embeddings are those of its prompt."""
    if not isinstance(text, Embedded):
        return torch.ones(len(text), device=model.device)
    own = model.embed(text.prompts).embeds
    same = [(given == own[part]).flatten(1).all(1) for part, given in text.embeds.items()]
    return torch.stack(same).all(0).float()

"""EraseAnything: concept erasure in rectified flow transformers (Gao et al., ICML 2025). https://arxiv.org/abs/2412.20413

Trains a LoRA beside the maps to the text's queries and keys in joint attention. Even steps erase. Their objective is
ESD's for the flow v, with a neutral prompt c_b in place of the null prompt, and a penalty on attention to the concept's
tokens:

    L_even = || v_theta(x_t, c) - [ v*_b - eta (v*_c - v*_b) ] ||^2  +  beta sum_p sum_tokens || A_p ||_heads.

Odd steps retain, on images x of the concept's prompt. Their objective is the model's own loss, and a reversed InfoNCE:
attention to the concept should be more similar to attention to unrelated words than to attention to a synonym,

    L_odd = gamma_1 || v_theta(x_t, c) - (eps - x) ||^2  +  gamma_2 [ s(a_c) - log( e^s(a_c) + sum_k e^s(a_k) ) ],

with s(a) = cos(a_synonym, a) / tau, where a_w is the attention map of a word w in the last joint attention.

The authors' "frozen" targets are computed with the LoRA (issue 11 of their repository): teacher=student. By default,
the teacher is the model without the LoRA.

Deviations:
- x_t of even steps lies on a trajectory. The authors' code intends finished images. But its sampler takes 28 steps of a
  thousandth, so that x_t is noise, 2.8 % of the way to an image. Its t is random, and the next odd step uses it again.
- Attention is that of the image's positions, and a_w is the mean over heads. The code uses all positions, and one head.
- All a_w are computed at one x_t, at the positions of each word in its own prompt. The code samples one such x_t for
  each word, and uses the positions of the concept.
- The prompt is not changed. The code shuffles its words nine times in ten, and replaces one by a synonym half the time.
- Synonyms, unrelated words and c_b (the anchor's prompt) come from the task, and the model generates the images. The
  authors get words from WordNet and a language model, and set c_b and the images by hand.
- The LoRA's A is drawn from N(0, 1 / rank).
"""

# B batch, N heads, P places, L tokens, N images, C H W latent shape, K unrelated words.
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unlearning.config.values import Count, NonNegative, Positive
from unlearning.data.generated import Generated
from unlearning.methods.esd import ESD
from unlearning.models.attention import concept_places, text_attention_maps
from unlearning.models.base import Model
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.joint_attention import JointAttention
from unlearning.sampling.denoising import noised
from unlearning.training.forget_retain import ForgetRetain, drawn
from unlearning.training.student import LoRA

UNRELATED = ("bicycle", "umbrella", "clock", "bridge", "apple", "guitar", "mountain", "book")  # if nothing is retained


class EraseAnything(ESD):
    """ESD and attention losses for rectified flows.

    Args:
        generated: Generates the concept's images, if the store lacks them.
        count: Images, over all concepts.
        teacher: The model whose predictions are the targets: "frozen", without the LoRA, or "student", with it, as in
            the released code.
        beta: Weight of attention to the concept's tokens.
        gamma_1, gamma_2: Weights of the flow's own objective and of the reversed InfoNCE.
        unrelated: K, unrelated words at a step.
        tau: Temperature of the InfoNCE.
        esd: ESD's arguments, the student being a LoRA.
    """

    works_on: type[Model] = JointAttention
    trains = LoRA

    def __init__(
        self,
        *,
        generated: Generated,
        count: Count = 10,
        teacher: Literal["frozen", "student"] = "frozen",
        beta: NonNegative = 1e-3,
        gamma_1: NonNegative = 0.1,
        gamma_2: NonNegative = 0.1,
        unrelated: Count = 3,
        tau: Positive = 0.07,
        **esd,
    ):
        super().__init__(**esd)
        self.generated, self.count, self.predicting = generated, count, teacher
        self.beta, self.gamma_1, self.gamma_2, self.unrelated, self.tau = beta, gamma_1, gamma_2, unrelated, tau

    def anchors(self, prompts: tuple[str, ...]) -> list[str]:
        of = {self.prompt(concept.name): self.prompt(concept.anchor) for concept in self.task.erase}
        return [of[prompt] for prompt in prompts]

    def data(self) -> ForgetRetain:
        return ForgetRetain(self._images, self.batch_size, self.seed)

    def _images(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor]]:
        """Latents (N, C, H, W) and concepts' numbers (N,) of their images; nothing to retain."""
        prompts = [self.prompt(concept.name) for concept in self.task.erase]
        x_0, concepts = drawn(self.teacher, self.generated, prompts, self.count)
        return (x_0, concepts), (x_0[:0],)

    def loss(self, batch: Any) -> Tensor:
        x_0, concepts = batch["forget"]
        return self.keep(x_0, concepts.tolist()) if self.global_step % 2 else self.erase(x_0, concepts.tolist())

    def erase(self, x_0: Tensor, concepts: list[int]) -> Tensor:
        """L_even (); attention is taken on noised images of the concepts."""
        names = [self.task.erase[i].name for i in concepts]
        teacher = self.student if self.predicting == "student" else self.teacher
        esd = self.erasing(*self.draw([self.prompt(name) for name in names]), teacher)
        A, places, _ = self._attention(self.student, *noised(self.teacher, x_0), names)
        return esd + self.beta * A.movedim(-1, 1)[places].norm(dim=1).sum() / len(names)

    def keep(self, x_0: Tensor, concepts: list[int]) -> Tensor:
        """L_odd () on images of the concepts."""
        x_t, t = noised(self.teacher, x_0)
        names = [self.task.erase[i].name for i in concepts]
        A, places, v = self._attention(self.student, x_t, t, names)
        flow = F.mse_loss(v, self.teacher.to_prediction(x_0, x_t, t))
        synonyms = [_any(self.task.erase[i].synonyms or (self.task.erase[i].name,)) for i in concepts]
        others = [concept.name for concept in self.task.retain] or [w for w in UNRELATED if w not in names]
        words = [others[i] for i in torch.randperm(len(others)).tolist()[: self.unrelated]]
        teacher = self.student if self.predicting == "student" else self.teacher
        with torch.no_grad():
            a_s = columns(*self._attention(teacher, x_t, t, synonyms)[:2])
            a_k = [columns(*self._attention(teacher, x_t, t, [word] * len(names))[:2]) for word in words]
        return self.gamma_1 * flow + self.gamma_2 * steering(columns(A, places), a_s, torch.stack(a_k, 1), self.tau)

    def _attention(
        self, model: DiffusionModel, x_t: Tensor, t: Tensor, words: list[str]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The last block's attention (B, N, P, L) for prompts of B words, their positions (B, L), the prediction."""
        prompts = [self.prompt(word) for word in words]
        with text_attention_maps(model) as maps:
            v = model.predict(x_t, t, model.encode_prompts(prompts))
        *_, last = maps.values()
        return last[-1].float(), concept_places(self.teacher, prompts, words), v


def columns(A: Tensor, places: Tensor) -> Tensor:
    """The attention map of a word, (B, P): the mean of A (B, N, P, L) over heads and over its positions (B, L)."""
    chosen = places.float() / places.sum(1, keepdim=True)
    return torch.einsum("bnpl,bl->bp", A, chosen) / A.shape[1]


def steering(a_c: Tensor, a_s: Tensor, a_k: Tensor, tau: float) -> Tensor:
    """The reversed InfoNCE () of the concept's a_c (B, P), a synonym's a_s (B, P) and unrelated words' a_k (B, K, P).

    It is the log of the share of a_c in the similarity to a_s; it is small if the unrelated words are more similar.
    """
    s = F.cosine_similarity(a_s[:, None], torch.cat([a_c[:, None], a_k], 1), dim=-1) / tau
    return s.log_softmax(1)[:, 0].mean()


def _any(words: tuple[str, ...]) -> str:
    return words[int(torch.randint(len(words), ()))]

"""Ablating Concepts in Text-to-Image Diffusion Models (Kumari et al., 2023). https://arxiv.org/abs/2303.13516

Images of a target concept c* should be distributed as those of an anchor concept c. The model itself generates images x
for prompts about c. On these images, noised, it learns to predict for the target prompt what it predicts for the anchor
prompt (model-based), or the noise that was added (noise-based):

    model:  || eps_theta(x_t, c*) - sg[ eps(x_t, c) ] ||^2,        noise:  || eps_theta(x_t, c*) - eps ||^2,

plus lamb || eps_theta(x_t, c) - eps ||^2, prior preservation, where target and anchor share words. The target prompt is
the anchor prompt with the target's name in place of the anchor's; of a style it is the anchor prompt with ", in the
style of" and the name appended.

sg[eps] is by default the prediction of the network that is being trained, without gradients: the paper derives the
objective with the pretrained network and then replaces it, to hold one network only, and the authors' code does the
same. teacher=frozen takes the pretrained network.

Where the authors' code (commit c11fb1b) computes something else than the formulas:

- The ablation loss is the sum over the four channels of a latent, four times the mean, and so is clipped earlier:
  max_grad_norm=0.25 is the same step. The prior's is a mean in the diffusers script, prior_weight=0.25 here, and a sum
  too in the CompVis script, which weighs the ablation by 0.2, prior_weight=5 here.
- No gradient passes through the keys and values of the first text state, the start of the text: fixed_start=true.

Deviations: anchor prompts are combined from static lists, where the authors ask a language model; by default the run's
own sampler draws the images (the authors: DPM-Solver, 25 steps, guidance 6); images are flipped, but not resized,
padded and masked (for objects, the authors scale them by 1/3 to 1.4 and add "very small" or "close up" to the target
prompt); a style's prompt is always the anchor prompt with the style appended, while the code also puts it in front; an
image's latent is its mode and not a sample. A concept without an anchor gets a generic one (GENERIC).
"""

# B batch, N images, P prompts, C H W latent shape.
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import product
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlearning.concepts import Concept, Kind, UnlearningTask
from unlearning.config.values import Count, NonNegative, Positive, Template
from unlearning.data.generated import Generated
from unlearning.erasures.base import Erasure
from unlearning.errors import unknown
from unlearning.methods.base import TrainedMethod
from unlearning.models.attention import cross_attention
from unlearning.models.diffusion import DiffusionModel
from unlearning.sampling.denoising import denoising_loss, noised
from unlearning.sampling.sampler import per_row
from unlearning.training.forget_retain import ForgetRetain, encoded

Target = Literal["model", "noise"]
Teacher = Literal["student", "frozen"]
GENERIC: dict[str, str] = {"object": "object", "style": "painting"}

PICTURES = (
    "{}", "the {}", "a photo of the {}", "a picture of the {}", "an image of the {}", "a drawing of the {}",
    "a painting of the {}", "a close-up of the {}", "a small {}", "a large {}",
)  # fmt: skip
PLACES = (
    "", "in the morning", "at night", "at sunset", "in the rain", "in the snow", "in a garden", "in a forest",
    "in a room", "in a city", "on a table", "on a street", "on a hill", "on a beach", "by a window", "by a river",
    "in bright light", "in soft light", "seen from above", "against a white wall",
)  # fmt: skip
SUBJECTS = (
    "a house", "a garden", "a mountain", "a river", "the sea", "a forest", "a village", "a bridge", "a boat", "a horse",
    "a bird", "a vase of flowers", "a bowl of fruit", "an old man", "a woman", "a child", "a dancer", "a street",
    "a field", "the sky",
)  # fmt: skip
TIMES = (
    "", "in spring", "in summer", "in autumn", "in winter", "at dawn", "at noon", "at dusk", "at night", "in the rain"
)  # fmt: skip
TEMPLATES: dict[str, tuple[str, ...]] = {  # 200 each; {} is the anchor's place
    "object": tuple(" ".join(parts).strip() for parts in product(PICTURES, PLACES)),
    "style": tuple(" ".join(("{} of", *parts)).strip() for parts in product(SUBJECTS, TIMES)),
}


class ConceptAblation(TrainedMethod):
    """Trains the concept's prompts towards an anchor.

    Args:
        generated: Generates the anchor's images, if the store lacks them.
        kind: "object" or "style"; None for the task's own.
        target: "model" or "noise".
        teacher: The model whose prediction for the anchor is the model-based target: "student" or "frozen".
        count: N, the number of images, over the anchor prompts of all concepts.
        templates: Anchor prompts with {} in the anchor's place; None for 200 of this file.
        prior_weight: lamb, the weight of prior preservation.
        flip: Whether every other image is mirrored, at random.
        max_grad_norm: The norm to which gradients are clipped.
        fixed_start: Whether keys and values of the first text state get no gradient; needs a UNet.
        training: TrainedMethod's arguments; batch_size is the number of images in a step.
    """

    def __init__(
        self,
        *,
        generated: Generated,
        kind: Kind | None = None,
        target: Target = "model",
        teacher: Teacher = "student",
        count: Count = 1000,
        templates: Sequence[Template] | None = None,
        prior_weight: NonNegative = 0.0,
        flip: bool = True,
        max_grad_norm: Positive = 1.0,
        fixed_start: bool = False,
        **training,
    ):
        super().__init__(**training)
        given = (("kind", kind or "object", Kind), ("target", target, Target), ("teacher", teacher, Teacher))
        for name, value, known in given:
            if value not in get_args(known):
                raise unknown(name, value, get_args(known))
        self.generated, self.kind, self.based_on, self.predicting = generated, kind, target, teacher
        self.count, self.templates = count, templates
        self.prior_weight, self.flip, self.max_grad_norm = prior_weight, flip, max_grad_norm
        self.fixed_start = fixed_start

    def fit(self, model: DiffusionModel, task: UnlearningTask) -> Erasure:
        if self.fixed_start:
            cross_attention(model)  # raises UserError before any image is generated
        return super().fit(model, task)

    def _train(self, own: str) -> None:
        with start_fixed(self.student) if self.fixed_start else nullcontext():
            super()._train(own)

    def prompts(self) -> tuple[list[str], list[str]]:
        """The P anchor prompts, and for each of them the target prompt."""
        templates = self.templates or TEMPLATES[self.kind or self.task.kind]
        pairs = [self._pair(template, concept) for template in templates for concept in self.task.erase]
        return [anchor for anchor, _ in pairs], [target for _, target in pairs]

    def _pair(self, template: str, concept: Concept) -> tuple[str, str]:
        kind = self.kind or self.task.kind
        anchor = template.format(concept.anchor or GENERIC[kind])
        styled = f"{anchor}, in the style of {concept.style}"
        return anchor, styled if kind == "style" else template.format(concept.name)

    def data(self) -> ForgetRetain:
        return ForgetRetain(self._drawn, self.batch_size, self.seed)

    def _drawn(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Latents (N, C, H, W), those of the mirrored images, and the prompts' numbers (N,); again for the prior."""
        self.anchor_prompts, self.target_prompts = self.prompts()
        images = self.generated(self.teacher, self.anchor_prompts, self.count)
        x_0 = encoded(self.teacher, images)
        mirrored = encoded(self.teacher, [image[:, ::-1] for image in images]) if self.flip else x_0
        drawn = x_0, mirrored, torch.arange(len(x_0), device=x_0.device) % len(self.anchor_prompts)
        return drawn, tuple(tensor if self.prior_weight else tensor[:0] for tensor in drawn)

    def loss(self, batch: dict[str, tuple[Tensor, ...]]) -> Tensor:
        loss = self.ablation(*batch["forget"])
        return loss + self.prior_weight * self.prior(*batch["retain"]) if "retain" in batch else loss

    def ablation(self, x_0: Tensor, mirrored: Tensor, prompts: Tensor) -> Tensor:
        """|| eps_theta(x_t, c*) - target ||^2, ()."""
        x_0, x_t, t = self._noised(x_0, mirrored)
        c_target = self.student.encode([self.target_prompts[i] for i in prompts.tolist()])
        if self.based_on == "noise":
            return denoising_loss(self.student, x_0, x_t, t, c_target)
        return F.mse_loss(self.student.predict(x_t, t, c_target), self._anchors(x_t, t, prompts))

    def prior(self, x_0: Tensor, mirrored: Tensor, prompts: Tensor) -> Tensor:
        """|| eps_theta(x_t, c) - eps ||^2, ()."""
        x_0, x_t, t = self._noised(x_0, mirrored)
        c = self.student.encode([self.anchor_prompts[i] for i in prompts.tolist()])
        return denoising_loss(self.student, x_0, x_t, t, c)

    @torch.no_grad()
    def _anchors(self, x_t: Tensor, t: Tensor, prompts: Tensor) -> Tensor:
        """sg[eps(x_t, c)], (B, C, H, W)."""
        model = self.teacher if self.predicting == "frozen" else self.student
        return model.predict(x_t, t, model.encode_prompts([self.anchor_prompts[i] for i in prompts.tolist()]))

    def _noised(self, x_0: Tensor, mirrored: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x_0, x_t, t) of B images, each mirrored or not."""
        x_0 = torch.where(per_row(torch.rand(len(x_0), device=x_0.device) < 0.5), x_0, mirrored)
        return x_0, *noised(self.teacher, x_0)


@contextmanager
def start_fixed(model: DiffusionModel) -> Iterator[None]:
    """A context in which no gradient passes through keys and values of the first text state in cross-attention."""

    def hook(layer: nn.Module, arguments: tuple, states: Tensor) -> Tensor:
        return torch.cat([states[:, :1].detach(), states[:, 1:]], dim=1)

    with ExitStack() as stack:
        for layer in cross_attention(model).values():
            for projection in (layer.to_k, layer.to_v):
                stack.callback(projection.register_forward_hook(hook).remove)
        yield

"""Forget-Me-Not: attention re-steering (Zhang et al., 2023). https://arxiv.org/abs/2303.17591

Minimises attention to the concept's name on noised images of the concept, with the name as prompt:

    min_theta || [ A_l[:, tokens] ]_l ||_2,

A_l: the attention probabilities of layer l, of all heads and places, at the tokens of the concept and, with `pooler`,
at the end of the text. There is no loss on the noise. The rest is retained because training takes few steps at a small
learning rate.

Defaults are those of the authors' configuration: 35 steps of one image at 2e-6, all of the UNet's weights, gradients
clipped to a norm of 1. UnlearnCanvas's benchmark takes cross-attention alone, 100 steps at 2e-5, for styles.

Deviations:
- The model draws the concept's images, where the authors take ten photographs.
- Gradients are clipped, as the authors' configuration says. Their code clips none where the whole UNet is trained,
  because its optimizer has consumed the generator of the weights: max_grad_norm=1e9.
- In batches of several prompts, the authors' code selects the tokens of one prompt in heads of another. It trains on
  one image per step, where this makes no difference.
- An image's latent is its mode and not a sample.
- The concept is its name: the authors' first stage, textual inversion of these images, is left out (use_ti=false).
- The end of the text is one state, as in the authors' code for Stable Diffusion 2.1; for 1.x their code takes all of
  the padding, which repeats it.
- In joint attention (SD3, Flux) A_l are the text's columns in the rows of the image. The paper has a UNet only.
"""

# B batch, N heads, P places, L tokens, C H W latent shape.
import torch
from torch import Tensor

from unlearning.concepts import UnlearningTask
from unlearning.config.values import Count, Positive, Template
from unlearning.data.generated import Generated
from unlearning.erasures.base import Erasure
from unlearning.methods.base import TrainedMethod
from unlearning.models.attention import concept_places, text_attention, text_attention_maps
from unlearning.models.diffusion import DiffusionModel
from unlearning.sampling.denoising import noised
from unlearning.training.forget_retain import ForgetRetain, drawn


class FMN(TrainedMethod):
    """Minimises attention to the concept's tokens.

    Args:
        generated: Generates the images, if the store lacks them.
        count: Number of images of all concepts together.
        template: How a name becomes a prompt; for a style "a photo in the style of {}".
        pooler: Whether the end of the text is among the tokens.
        max_grad_norm: The norm to which gradients are clipped.
        training: TrainedMethod's arguments; batch_size is the number of images in a step.
    """

    def __init__(
        self,
        *,
        generated: Generated,
        count: Count = 10,
        template: Template = "a photo of {}",
        pooler: bool = True,
        max_grad_norm: Positive = 1.0,
        **training,
    ):
        super().__init__(**training)
        self.generated, self.count, self.template = generated, count, template
        self.pooler, self.max_grad_norm = pooler, max_grad_norm

    def fit(self, model: DiffusionModel, task: UnlearningTask) -> Erasure:
        text_attention(model)  # refused before any image is drawn
        return super().fit(model, task)

    def data(self) -> ForgetRetain:
        return ForgetRetain(self._drawn, self.batch_size, self.seed)

    def _drawn(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor]]:
        """Latents (N, C, H, W) and prompts' numbers (N,) of the concepts' images; nothing to retain."""
        names = [concept.name for concept in self.task.erase]
        self.prompts = [self.template.format(name) for name in names]
        self.places = concept_places(self.teacher, self.prompts, names, end=self.pooler)
        x_0, prompts = drawn(self.teacher, self.generated, self.prompts, self.count)
        return (x_0, prompts), (x_0[:0],)

    def loss(self, batch: dict[str, tuple[Tensor, ...]]) -> Tensor:
        x_0, prompts = batch["forget"]
        x_t, t = noised(self.teacher, x_0)
        c = self.student.encode([self.prompts[i] for i in prompts.tolist()])
        with text_attention_maps(self.student) as maps:
            self.student.predict(x_t, t, c)
        return attention_norm(maps, self.places[prompts])


def attention_norm(maps: dict[str, list[Tensor]], places: Tensor) -> Tensor:
    """The norm () of the attention of the last call at `places` (B, L), over the maps (B, N, P, L) of all layers."""
    return torch.cat([calls[-1].movedim(-1, 1)[places].flatten().float() for calls in maps.values()]).norm()

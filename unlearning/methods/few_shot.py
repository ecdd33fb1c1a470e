"""Few-shot unlearning of the text encoder (Fuchi & Takagi, BMVC 2024). https://arxiv.org/abs/2405.07288

Trains the text encoder tau to make the denoiser's prediction worse on a few noised images of the concept, with its name
as prompt. This is gradient ascent on the loss that textual inversion minimises,

    min_theta  - || eps(x_t, tau_theta(template(c))) - eps ||^2.

The MLPs of all layers and the last layer's self-attention are trained; the denoiser is not. The loss has no lower
bound, so that only a few steps are possible.

Defaults are those of the authors' code: 4 images, the README's 4 epochs (the script's default is 5) of batches of 2,
which is 8 steps, of Adam at 1e-5.
latents=noise is its zero-shot variant: uniform numbers from 0 to 1 in place of the images' latents. (As released, these
have a dimension too many, which the UNet refuses.)

Deviations:
- The model draws the images, where the authors take photographs. An image's latent is its mode and not a sample.
- CLIP's encoders alone are trained, all of a model's; a T5 beside them (SD3, Flux) keeps what it knows of the concept.
- Templates are combined of parts (FRAMES and LOOKS, MEDIA and TONES), much as those of textual inversion are.
"""

# B batch, N images, C H W latent shape.
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from itertools import product
from typing import Literal

import torch
from torch import Tensor

from unlearning.concepts import Kind
from unlearning.config.values import Count, Template
from unlearning.data.generated import Generated
from unlearning.errors import UserError
from unlearning.methods.base import TrainedMethod
from unlearning.models.diffusion import DiffusionModel
from unlearning.sampling.denoising import denoising_loss, noised
from unlearning.training.forget_retain import ForgetRetain, drawn
from unlearning.training.student import Pair, Student, Weights

Latents = Literal["drawn", "noise"]
LAYER = re.compile(r"(text_encoder\w*\.(?:text_model\.)?encoder\.layers\.)(\d+)\.self_attn\.")
FRAMES = ("a photo of {} {{}}", "a close-up photo of {} {{}}", "a rendition of {} {{}}", "a cropped photo of {} {{}}")
LOOKS = ("a", "the", "a small", "a large", "a nice", "a clean", "the cool")
MEDIA, TONES = ("painting", "picture", "rendition"), ("", " cropped", " dark", " bright", " small")
TEMPLATES: dict[str, tuple[str, ...]] = {  # {} is the concept's place
    "object": tuple(frame.format(look) for frame, look in product(FRAMES, LOOKS)),
    "style": tuple(f"a{look} {medium} in the style of {{}}" for medium, look in product(MEDIA, TONES)),
}


class MLPsAndLastAttention(Student):
    """The student: in every CLIP text encoder the MLPs of all layers, and the last layer's self-attention."""

    def of(self, model: DiffusionModel) -> AbstractContextManager[Pair]:
        """A context with student and teacher. When it ends, the model is restored.

        Raises:
            UserError: If the model has no CLIP text encoder.
        """
        last: dict[str, int] = {}
        for match in filter(None, map(LAYER.match, model.named_parameters())):
            last[match[1]] = max(last.get(match[1], 0), int(match[2]))
        if not last:
            raise UserError(
                f"{model.name} has no CLIP text encoder, which is all that few-shot unlearning trains. Choose a model "
                "that has one (sd14, sd15, sd21, sdxl, sd3, flux, emoji_unet, emoji_sd3), or another method."
            )
        layers = (rf"{re.escape(layers)}(\d+\.mlp\.|{number}\.self_attn\.)" for layers, number in last.items())
        return Weights(f"^({'|'.join(layers)})").of(model)


class FewShot(TrainedMethod):
    """Gradient ascent of the text encoder on a few images.

    Args:
        generated: Generates the images, if the store lacks them.
        count: N, images, over all concepts.
        kind: "object" or "style"; None for the task's own.
        templates: How a name becomes a prompt, at random; None for those of this file.
        latents: "drawn": of the images; "noise": of none, the zero-shot variant.
        training: TrainedMethod's arguments; batch_size is the number of images in a step.
    """

    def __init__(
        self,
        *,
        generated: Generated,
        count: Count = 4,
        kind: Kind | None = None,
        templates: Sequence[Template] | None = None,
        latents: Latents = "drawn",
        **training,
    ):
        super().__init__(**training)
        self.generated, self.count, self.latents = generated, count, latents
        self.kind, self.templates = kind, templates

    def data(self) -> ForgetRetain:
        return ForgetRetain(self._images, self.batch_size, self.seed)

    def _images(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor]]:
        """Latents (N, C, H, W) and the concepts' numbers (N,); nothing to retain."""
        prompts = [self.task.prompt(concept.name) for concept in self.task.erase]
        if self.latents == "drawn":
            x_0, concepts = drawn(self.teacher, self.generated, prompts, self.count)
        else:
            torch.manual_seed(self.seed)
            x_0 = torch.rand(self.count, *self.teacher.latent_shape).to(self.teacher.device)
            concepts = torch.arange(self.count, device=x_0.device) % len(prompts)
        return (x_0, concepts), (x_0[:0],)

    def loss(self, batch: dict[str, tuple[Tensor, ...]]) -> Tensor:
        x_0, concepts = batch["forget"]
        kind = self.kind or self.task.kind
        every = self.templates or TEMPLATES[kind]
        templates = [every[i] for i in torch.randint(len(every), (len(x_0),)).tolist()]
        named = [self.task.erase[i] for i in concepts.tolist()]
        names = [concept.style if kind == "style" else concept.name for concept in named]
        x_t, t = noised(self.teacher, x_0)
        c = self.student.encode([template.format(name) for template, name in zip(templates, names, strict=True)])
        return -denoising_loss(self.student, x_0, x_t, t, c)

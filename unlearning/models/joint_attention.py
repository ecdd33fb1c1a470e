"""Models whose denoiser attends to image and text jointly, and predicts a flow: SD3 and Flux."""

from collections.abc import Iterator
from typing import ClassVar

from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from unlearning.models.stable_diffusion import StableDiffusion


class JointAttention(StableDiffusion):
    """The base class of SD3 and Flux."""

    component = "transformer"
    solver = FlowMatchEulerDiscreteScheduler
    load_options: ClassVar[dict] = {}

    def text_projections(self) -> Iterator[tuple[str, nn.Linear]]:
        yield "transformer.context_embedder", self.denoiser.context_embedder

    def pooled_projections(self) -> Iterator[tuple[str, nn.Linear]]:
        name = "time_text_embed.text_embedder.linear_1"
        yield f"transformer.{name}", self.denoiser.get_submodule(name)

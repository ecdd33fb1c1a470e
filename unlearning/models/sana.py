"""Sana: a linear transformer on a deep autoencoder's latents, flow matching, prompts read by a language model."""

import inspect
from collections.abc import Iterator, Sequence
from typing import ClassVar

from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, SanaPipeline
from diffusers.models.autoencoders.vae import EncoderOutput
from torch import Tensor, nn

from unlearning.models.conditioning import Conditioning
from unlearning.models.stable_diffusion import StableDiffusion

# What SanaPipeline writes in front of a prompt, though never of the null prompt.
INSTRUCTION = inspect.signature(SanaPipeline.__call__).parameters["complex_human_instruction"].default


class Sana(StableDiffusion):
    """Sana."""

    component = "transformer"
    solver = DPMSolverMultistepScheduler
    pipeline_class: type[DiffusionPipeline] = SanaPipeline
    load_options: ClassVar[dict] = {}

    def _encode(self, prompts: list[str]) -> Conditioning:
        return Conditioning.cat([self._encode_one(prompt) for prompt in prompts])

    def _encode_one(self, prompt: str) -> Conditioning:
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            prompt, False, device=self.device, complex_human_instruction=INSTRUCTION if prompt else None
        )
        return Conditioning(embeds, {"mask": mask})

    def last_token(self, prompts: Sequence[str], encoder: str | None = None) -> Tensor:
        return self.encode(prompts, edits=()).extra["mask"].sum(1).long() - 1  # Gemma marks no end of text

    @staticmethod
    def _mean(encoded: EncoderOutput) -> Tensor:
        return encoded.latent  # AutoencoderDC's codes have no variance

    def text_projections(self) -> Iterator[tuple[str, nn.Linear]]:
        yield "transformer.caption_projection.linear_1", self.denoiser.caption_projection.linear_1

    def _denoiser_inputs(self, x_t: Tensor, t: Tensor, c: Conditioning) -> tuple[tuple, dict]:
        inputs = {"encoder_hidden_states": c.embeds, "encoder_attention_mask": c.extra["mask"]}
        return (x_t,), {**inputs, "timestep": t.expand(len(x_t)) * self.denoiser.config.timestep_scale}

"""Flux: joint attention over latents packed two by two, flow matching, and a guidance scale as an input."""

from typing import Self

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from unlearning.config.signatures import forwards_to
from unlearning.config.values import NonNegative
from unlearning.models.conditioning import Conditioning
from unlearning.models.joint_attention import JointAttention
from unlearning.models.stable_diffusion import StableDiffusion


class Flux(JointAttention):
    """Flux.1; `embedded_guidance` is the scale that the network itself takes."""

    tokenizer = "tokenizer_2"
    pipeline_class: type[DiffusionPipeline] = FluxPipeline
    patch = 2
    embedded_guidance = 3.5

    @classmethod
    @forwards_to(StableDiffusion.load)
    def load(cls, path: str, *, embedded_guidance: NonNegative = 3.5, **settings) -> Self:
        """StableDiffusion.load.

        Args:
            embedded_guidance: The guidance scale that a guidance-distilled model (FLUX.1-dev) takes as an input: one
                evaluation a step. The sampler's guidance_scale is that of classifier-free guidance, which needs two; 1
                turns it off.
        """
        model = super().load(path, **settings)
        model.embedded_guidance = embedded_guidance
        return model

    @property
    def numerics(self) -> str:
        return f"{super().numerics}, embedded guidance {self.embedded_guidance}"

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        H, W = self.latent_size or (self.vae.config.sample_size // self.pipeline.vae_scale_factor,) * 2
        return self.denoiser.config.in_channels // self.patch**2, H, W

    def _encode(self, prompts: list[str]) -> Conditioning:
        embeds, pooled, _ = self.pipeline.encode_prompt(list(prompts), device=self.device)
        return Conditioning(embeds, {"pooled": pooled})

    def set_timesteps(self, scheduler: FlowMatchEulerDiscreteScheduler, steps: int) -> None:
        """As FluxPipeline does: from 1 down to 1 / steps, with a shift that grows with the image."""
        _, height, width = self.latent_shape
        shift = self.scheduler.config
        mu = calculate_shift(
            height * width // self.patch**2,
            shift.base_image_seq_len, shift.max_image_seq_len, shift.base_shift, shift.max_shift,
        )  # fmt: skip
        scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps), mu=mu, device=self.device)

    def _denoiser_inputs(self, x_t: Tensor, t: Tensor, c: Conditioning) -> tuple[tuple, dict]:
        tokens = F.pixel_unshuffle(x_t, self.patch)  # (B, 4 C, H / 2, W / 2)
        rows, columns = (torch.arange(side, device=x_t.device) for side in tokens.shape[-2:])
        inputs = {"encoder_hidden_states": c.embeds, "pooled_projections": c.extra["pooled"]}
        places = {
            "img_ids": torch.cartesian_prod(torch.zeros_like(rows[:1]), rows, columns).to(x_t),
            "txt_ids": x_t.new_zeros(c.embeds.shape[1], 3),
        }
        if self.denoiser.config.guidance_embeds:
            inputs["guidance"] = x_t.new_full((len(x_t),), self.embedded_guidance)
        sigma = t.expand(len(x_t)) / self.scheduler.config.num_train_timesteps
        return (tokens.flatten(2).transpose(1, 2),), {**inputs, **places, "timestep": sigma}

    def _unpacked(self, output: Tensor, shape: torch.Size) -> Tensor:
        height, width = (side // self.patch for side in shape[-2:])
        return F.pixel_shuffle(output.transpose(1, 2).unflatten(2, (height, width)), self.patch)

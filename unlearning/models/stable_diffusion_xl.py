"""SDXL: two text encoders, a pooled embedding, and micro-conditioning on the image's size and crop."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from torch import Tensor, nn

from unlearning.models.conditioning import Conditioning
from unlearning.models.stable_diffusion import StableDiffusion


class StableDiffusionXL(StableDiffusion):
    """SDXL."""

    pipeline_class: type[DiffusionPipeline] = StableDiffusionXLPipeline
    load_options: ClassVar[dict] = {"add_watermarker": False}

    def __init__(self, *args, **keywords):
        super().__init__(*args, **keywords)
        if self.vae.dtype == torch.float16 and self.vae.config.force_upcast:  # it overflows, as diffusers' own knows
            self.vae.to(torch.float32)

    def _autoencoding(self) -> AbstractContextManager:
        upcast = self.vae.config.force_upcast
        return torch.autocast(self.device.type, enabled=False) if upcast else super()._autoencoding()

    def _encode(self, prompts: list[str]) -> Conditioning:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if self.pipeline.config.force_zeros_for_empty_prompt:  # SDXL's null prompt is zeros, not an encoded ""
            given = torch.tensor([bool(p) for p in prompts], device=embeds.device)
            embeds, pooled = embeds * given[:, None, None], pooled * given[:, None]
        # The size that it generates. Images to learn from are cropped and resized to it beforehand.
        size = [side * self.pipeline.vae_scale_factor for side in self.latent_shape[1:]]
        time_ids = torch.tensor([[*size, 0, 0, *size]], dtype=embeds.dtype, device=embeds.device)
        return Conditioning(embeds, {"pooled": pooled, "time_ids": time_ids.expand(len(embeds), -1)})

    def text_states(self, c: Conditioning) -> dict[str, Tensor]:
        first = self.text_encoders["text_encoder"].config.hidden_size
        return {"text_encoder": c.embeds[..., :first], "text_encoder_2": c.embeds[..., first:]}

    def pooled_projections(self) -> Iterator[tuple[str, nn.Linear]]:
        yield "unet.add_embedding.linear_1", self.denoiser.add_embedding.linear_1  # the size and crop follow the text

    def _denoiser_inputs(self, x_t: Tensor, t: Tensor, c: Conditioning) -> tuple[tuple, dict]:
        text = {"text_embeds": c.extra["pooled"], "time_ids": c.extra["time_ids"]}
        return (x_t, t, c.embeds), {"added_cond_kwargs": text}

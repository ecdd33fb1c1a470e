"""PixArt-alpha and PixArt-Sigma: cross-attention to T5's states alone, and a variance is predicted too."""

from collections.abc import Iterator
from typing import ClassVar

from diffusers import DiffusionPipeline, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtSigmaPipeline
from torch import Tensor, nn

from unlearning.models.conditioning import Conditioning
from unlearning.models.stable_diffusion import StableDiffusion


class PixArt(StableDiffusion):
    """PixArt-alpha and PixArt-Sigma."""

    component = "transformer"
    solver = DPMSolverMultistepScheduler
    pipeline_class: type[DiffusionPipeline] = DiffusionPipeline  # alpha's or Sigma's, as the folder says
    load_options: ClassVar[dict] = {}

    @classmethod
    def pipelines(cls) -> tuple[type[DiffusionPipeline], ...]:
        return PixArtAlphaPipeline, PixArtSigmaPipeline

    def _encode(self, prompts: list[str]) -> Conditioning:
        embeds, mask, _, _ = self.pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=self.device
        )
        extra = {"mask": mask}
        if self.denoiser.use_additional_conditions:  # PixArt-alpha of 1024 pixels takes size and aspect ratio
            _, height, width = (side * self.pipeline.vae_scale_factor for side in self.latent_shape)
            extra["resolution"] = embeds.new_tensor([[height, width]]).expand(len(embeds), -1)
            extra["aspect_ratio"] = embeds.new_tensor([[height / width]]).expand(len(embeds), -1)
        return Conditioning(embeds, extra)

    def text_projections(self) -> Iterator[tuple[str, nn.Linear]]:
        yield "transformer.caption_projection.linear_1", self.denoiser.caption_projection.linear_1

    def _denoiser_inputs(self, x_t: Tensor, t: Tensor, c: Conditioning) -> tuple[tuple, dict]:
        inputs = {"encoder_hidden_states": c.embeds, "encoder_attention_mask": c.extra["mask"]}
        size = {key: c.extra.get(key) for key in ("resolution", "aspect_ratio")}
        return (x_t,), {**inputs, "added_cond_kwargs": size, "timestep": t.expand(len(x_t))}

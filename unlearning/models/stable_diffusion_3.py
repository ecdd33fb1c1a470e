"""SD3 and SD3.5: a transformer with joint attention, flow matching, three text encoders and a shifted VAE."""

from diffusers import DiffusionPipeline, StableDiffusion3Pipeline
from torch import Tensor

from unlearning.errors import UserError
from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.joint_attention import JointAttention


class StableDiffusion3(JointAttention):
    """SD3 and SD3.5."""

    pipeline_class: type[DiffusionPipeline] = StableDiffusion3Pipeline

    def _encode(self, prompts: list[str]) -> Conditioning:
        texts = list(prompts)
        # As many tokens as diffusers takes, or fewer, where the T5 was taught no more.
        longest = min(256, getattr(self.pipeline.tokenizer_3, "model_max_length", 256))
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            texts, texts, texts, device=self.device, do_classifier_free_guidance=False, max_sequence_length=longest
        )
        return Conditioning(embeds, {"pooled": pooled})

    def at_size(self, height: int | None, width: int | None) -> DiffusionModel:
        view, most = super().at_size(height, width), self.denoiser.config.pos_embed_max_size * self.patch
        if max(view.latent_shape[1:]) > most:
            raise UserError(f"{self.name} draws {most * self._scale} pixels a side at most, not {width} by {height}.")
        return view

    def text_states(self, c: Conditioning) -> dict[str, Tensor]:
        """CLIP's two encoders side by side, padded with zeros, and then the tokens of T5."""
        first, second = (self.text_encoders[name].config.hidden_size for name in ("text_encoder", "text_encoder_2"))
        tokens = self.pipeline.tokenizer_max_length
        clip, t5 = c.embeds[:, :tokens], c.embeds[:, tokens:]
        states = {"text_encoder": clip[..., :first], "text_encoder_2": clip[..., first : first + second]}
        return states | ({"text_encoder_3": t5} if "text_encoder_3" in self.parts else {})

    def _denoiser_inputs(self, x_t: Tensor, t: Tensor, c: Conditioning) -> tuple[tuple, dict]:
        inputs = {"encoder_hidden_states": c.embeds, "pooled_projections": c.extra["pooled"]}
        return (x_t,), {**inputs, "timestep": t.expand(len(x_t))}

"""Stable Diffusion 1.x and 2.x (epsilon and v prediction), and every model of their shape, emoji_unet among them.

What later families share with them is inherited from here.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar, Self

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from unlearning.config.precision import chosen_autocast, warn_if_slow
from unlearning.errors import UserError
from unlearning.models.base import Autocast, DType, chosen_device
from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.embeddings import lookup_tables
from unlearning.models.folders import check, check_complete, fingerprint, limit_lengths, variant

AT_ONCE = 2**20  # pixels that the autoencoder is shown: of one of 1024 by 1024 it makes gigabytes


class StableDiffusion(DiffusionModel):
    """Stable Diffusion 1.x and 2.x, and what later families inherit."""

    component = "unet"
    tokenizer = "tokenizer"  # what the pipeline calls that of the states which the denoiser attends to
    pipeline_class: type[DiffusionPipeline] = StableDiffusionPipeline
    # A safety checker makes images black, which would count as erasure.
    load_options: ClassVar[dict] = {"safety_checker": None, "requires_safety_checker": False}

    def __init__(self, pipeline: DiffusionPipeline, *, name: str, fingerprint: str, device: torch.device):
        self.pipeline, self.name, self.fingerprint = pipeline, name, fingerprint
        self.parts = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
        self.denoiser, self.vae, self.scheduler = self.parts[self.component], pipeline.vae, pipeline.scheduler
        self.dtype, self._device, self.side = self.denoiser.dtype, device, {}
        for part in self.parts.values():
            part.requires_grad_(False).eval()

    @classmethod
    def load(
        cls,
        path: str,
        *,
        dtype: DType = "float32",
        autocast: Autocast = None,
        device: str = "auto",
        attention_slicing: bool = False,
        gradient_checkpointing: bool = False,
        offload: bool = False,
        compile: bool = False,
    ) -> Self:
        """Loads a diffusers pipeline.

        Args:
            path: A folder that diffusers saved, or a repository's name on the Hugging Face hub. Weights of a variant
                ("fp16") are read if there are no others.
            dtype: The weights' dtype: float32, bfloat16 or float16.
            autocast: The dtype of the networks' computations, if it is another one; "auto" is bfloat16 on hardware that
                is fast in it. The weights keep their dtype.
            device: "auto" takes the accelerator where there is one; of several, each process of a distributed run its
                own.
            attention_slicing: Less memory, a little slower.
            gradient_checkpointing: Less memory in training, for more time: layers are recomputed on the
                way back.
            offload: Keeps in the accelerator's memory only the part that works (needs an accelerator).
            compile: Compiles the denoiser; worth it for long runs on an accelerator.

        Raises:
            UserError: Where there is no such folder, it is of another family, it is a pickled or a single file, it
                lacks weights, or the hub cannot be reached.
        """
        place, path = chosen_device(device), os.path.expanduser(path)
        warn_if_slow(autocast := chosen_autocast(autocast, dtype, device), place.type)
        check(path, cls.pipeline_class, cls.load_options)
        try:
            folder = path if Path(path).is_dir() else cls.pipeline_class.download(path, use_safetensors=True)
            pipeline = cls.pipeline_class.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                variant=variant(Path(folder) / cls.component),
                **cls.load_options,
            )
            for name, part in pipeline.components.items():
                if isinstance(part, nn.Module):
                    check_complete(part, Path(folder) / name)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"No model could be loaded from {path!r}: {error}\nGive a folder with model.path=/where/it/is, or "
                f"download it first: hf download {path}"
            ) from error
        pipeline.set_progress_bar_config(disable=True)
        limit_lengths(pipeline)
        if attention_slicing:
            pipeline.enable_attention_slicing()
        if gradient_checkpointing:
            getattr(pipeline, cls.component).enable_gradient_checkpointing()
        if offload and place.type != "cpu":
            pipeline.enable_model_cpu_offload()
        else:
            pipeline.to(place)
        if compile:
            torch._dynamo.config.skip_nnmodule_hook_guards = False  # side modules come and go as forward hooks
            getattr(pipeline, cls.component).compile()
        model = cls(pipeline, name=str(path), fingerprint=fingerprint(Path(folder)), device=place)
        model.autocast = getattr(torch, autocast) if autocast else None
        return model

    @classmethod
    def pipelines(cls) -> tuple[type[DiffusionPipeline], ...]:
        """The pipelines of this family."""
        return (cls.pipeline_class,)

    @classmethod
    def generates_with(cls, pipeline: DiffusionPipeline) -> bool:
        """Whether a pipeline is one of this family."""
        return isinstance(pipeline, cls.pipelines())

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        H, W = self.latent_size or (self.denoiser.config.sample_size,) * 2
        return self.denoiser.config.in_channels, H, W

    def _encode(self, prompts: list[str]) -> Conditioning:
        embeds, _ = self.pipeline.encode_prompt(prompts, self.device, 1, do_classifier_free_guidance=False)
        return Conditioning(embeds)

    def vocabulary(self) -> list[str]:
        pieces = getattr(self.pipeline, self.tokenizer).get_vocab()
        words = [p.removesuffix("</w>") for p in pieces if p.endswith("</w>")]  # CLIP marks a word's end
        words = words or [p.removeprefix("▁") for p in pieces if p.startswith("▁")]  # T5 and Gemma its beginning
        return sorted({word for word in words if len(word) >= 3 and word.isascii() and word.isalpha()})

    def text_states(self, c: Conditioning) -> dict[str, Tensor]:
        return {self.tokenizer.replace("tokenizer", "text_encoder"): c.embeds}

    def _tokenizer(self, encoder: str | None) -> PreTrainedTokenizerBase:
        return getattr(self.pipeline, encoder.replace("text_encoder", "tokenizer") if encoder else self.tokenizer)

    def token_table(self, encoder: str | None = None) -> tuple[Tensor, list[str]]:
        name, tokenizer = encoder or self.tokenizer.replace("tokenizer", "text_encoder"), self._tokenizer(encoder)
        table = dict(lookup_tables(self.text_encoders))[name]
        with torch.no_grad():  # some layers scale what they look up
            embeds = table(torch.arange(table.num_embeddings, device=table.weight.device)).to(self.device)
        # Decoders trim the ends of a text: so each token stands between two letters.
        a, b = tokenizer.convert_tokens_to_ids(["a", "b"])
        triples = [[a, i, b] for i in range(min(len(tokenizer), len(embeds)))]
        decoded = tokenizer.batch_decode(triples, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        texts = [t[1:-1] if t[1:-1].isprintable() and "\N{REPLACEMENT CHARACTER}" not in t else "" for t in decoded]
        return embeds, texts + [""] * (len(embeds) - len(texts))

    def token_ids(self, prompts: Sequence[str], encoder: str | None = None) -> list[list[int]]:
        tokens = self._tokenizer(encoder)(list(prompts), truncation=True, return_special_tokens_mask=True)
        rows = zip(tokens.input_ids, tokens.special_tokens_mask, strict=True)
        return [[i for i, special in zip(*row, strict=True) if not special] for row in rows]

    def last_token(self, prompts: Sequence[str], encoder: str | None = None) -> Tensor:
        tokens = self._tokenizer(encoder)(list(prompts), padding=True, truncation=True, return_tensors="pt")
        return (tokens.attention_mask.sum(1).to(self.device) - 2).clamp(min=0)  # an empty prompt has its first only

    @torch.no_grad()
    def encode_images(self, images: Tensor) -> Tensor:
        few = images.split(max(1, AT_ONCE // (images.shape[-2] * images.shape[-1])))
        encoded = [self._mean(self.vae.encode((2 * part - 1).to(self.device, self.vae.dtype))) for part in few]
        return (torch.cat(encoded).float() - self._shift) * self.vae.config.scaling_factor

    @staticmethod
    def _mean(encoded: AutoencoderKLOutput) -> Tensor:
        return encoded.latent_dist.mean

    @torch.no_grad()
    def decode(self, x_0: Tensor) -> Tensor:
        latents = (x_0 / self.vae.config.scaling_factor + self._shift).to(self.vae.dtype)
        pixels = x_0.shape[-2] * x_0.shape[-1] * self._scale**2
        with self._autoencoding():
            drawn = [self.vae.decode(few).sample for few in latents.split(max(1, AT_ONCE // pixels))]
        return (torch.cat(drawn).float() / 2 + 0.5).clamp(0, 1)

    def _autoencoding(self) -> AbstractContextManager:
        return self.precision()

    @property
    def _scale(self) -> int:
        return self.pipeline.vae_scale_factor

    @property
    def _shift(self) -> float:
        return self.vae.config.get("shift_factor") or 0.0

    def text_projections(self) -> Iterator[tuple[str, nn.Linear]]:
        for name, module in self.denoiser.named_modules():
            if name.endswith(("attn2.to_k", "attn2.to_v")):
                yield f"{self.component}.{name}", module

    def _denoiser_inputs(self, x_t: Tensor, t: Tensor, c: Conditioning) -> tuple[tuple, dict]:
        return (x_t, t, c.embeds), {}

"""Stable Diffusion 1.x and 2.x (epsilon and v prediction), and every model of their shape, emoji_unet among them.

What later families share with them is inherited from here.
"""

import json
import os
import re
import shlex
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import ClassVar, Self

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPPreTrainedModel, PreTrainedTokenizerBase

from unlearning.config.precision import warn_if_slow
from unlearning.errors import UserError
from unlearning.models.base import DType, chosen_device, fingerprint, load_complete
from unlearning.models.diffusion import Conditioning, DiffusionModel

FAMILIES = {  # model= by the name of the pipeline
    "StableDiffusionPipeline": "sd15",
    "StableDiffusionXLPipeline": "sdxl",
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "PixArtSigmaPipeline": "pixart",
    "PixArtAlphaPipeline": "pixart",
    "DiffusionPipeline": "pixart",  # which takes either
    "SanaPipeline": "sana",
    "DiTPipeline": "dit",
}
VARIANT = re.compile(r"model(?:-\d+-of-\d+)?\.([a-z]\w*)(?:-\d+-of-\d+)?\.safetensors$")
AT_ONCE = 2**20  # pixels that the autoencoder is shown: of one of 1024 by 1024 it makes gigabytes


class StableDiffusion(DiffusionModel):
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
        autocast: DType | None = None,
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
            dtype: Of the weights: float32, bfloat16 or float16.
            autocast: What the networks compute in, if it is another dtype. The weights keep theirs.
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
        warn_if_slow(autocast, place.type)
        _check(path, cls.pipeline_class)
        try:
            folder = path if Path(path).is_dir() else cls.pipeline_class.download(path, use_safetensors=True)
            pipeline = cls.pipeline_class.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                use_safetensors=True,
                variant=_variant(Path(folder) / cls.component),
                **cls.load_options,
            )
            for name, part in pipeline.components.items():
                if isinstance(part, nn.Module):  # on "meta", which takes no memory: for the report of what is missing
                    own = Path(folder) / name
                    load_complete(type(part), own, device_map="meta", use_safetensors=True, variant=_variant(own))
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise UserError(
                f"No model could be loaded from {path!r}: {error}\nGive a folder with model.path=/where/it/is, or "
                f"download it first: hf download {path}"
            ) from error
        pipeline.set_progress_bar_config(disable=True)
        _limit_lengths(pipeline)
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
        size = self.denoiser.config.sample_size
        return self.denoiser.config.in_channels, size, size

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
        """The side of an image over the side of its latent."""
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


def _check(path: str, pipeline_class: type[DiffusionPipeline]) -> None:
    """Raises UserError for what can be seen to fail before anything is loaded."""
    folder = Path(path)
    if folder.suffix in (".ckpt", ".pt", ".pth", ".bin"):
        raise UserError(
            f"{path} is a pickled checkpoint, and loading one can run whatever code it holds. Convert it once to a "
            "diffusers folder (diffusers' scripts/convert_original_stable_diffusion_to_diffusers.py, with "
            "--to_safetensors) and give that folder with model.path=..."
        )
    if folder.suffix == ".safetensors" and folder.is_file():
        raise UserError(
            f"{path} is a single file, without the configurations of its parts, which diffusers downloads. Convert it "
            f"once: {_conversion(pipeline_class, 'from_single_file', folder)}\nand give that folder with model.path=..."
        )
    if not folder.is_dir() and (folder.is_absolute() or path.startswith(".") or path.count("/") != 1):
        raise UserError(f"There is no model folder at {path}. Set model.path to a folder that diffusers saved.")
    if not folder.is_dir():
        return  # a repository of the hub
    if not (folder / "model_index.json").exists():
        raise UserError(f"{path} holds no model_index.json: it is not a folder that diffusers saved a pipeline to.")
    there = _pipeline_of(folder)
    if there in FAMILIES and FAMILIES[there] != FAMILIES.get(pipeline_class.__name__):
        raise UserError(f"{path} holds a {there}: model={FAMILIES[there]} model.path={shlex.quote(path)}")
    for part in (p for p in sorted(folder.iterdir()) if p.is_dir()):
        if list(part.glob("*.bin")) and not list(part.glob("*.safetensors")):
            raise UserError(
                f"No model could be loaded from {path!r}: its {part.name} holds pickled weights only, and loading them "
                "can run whatever code they hold. If you trust them, convert them once: "
                f"{_conversion(pipeline_class, 'from_pretrained', folder)}\nand give that folder with model.path=..."
            )


def _pipeline_of(folder: Path) -> str:
    """The name of the pipeline that a folder's model_index.json states; "" without one."""
    try:
        return json.loads((folder / "model_index.json").read_text()).get("_class_name", "")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{folder / 'model_index.json'} is broken: {error}. Copy the folder again.") from error


def _conversion(pipeline_class: type[DiffusionPipeline], load: str, source: Path) -> str:
    """The command that saves a pipeline as a folder of safetensors."""
    name, target = pipeline_class.__name__, source.with_name(f"{source.stem}-diffusers")
    code = f"from diffusers import {name}; {name}.{load}({str(source)!r}).save_pretrained({str(target)!r})"
    return f"python -c {shlex.quote(code)}"


def _variant(folder: Path) -> str | None:
    """The variant of the weights in a part's folder, "fp16" say; None if it has weights without a variant."""
    names = [path.name for path in folder.glob("*.safetensors")]
    found = [VARIANT.search(name) for name in names]
    return next((match[1] for match in found if match), None) if all(found) else None


def _limit_lengths(pipeline: DiffusionPipeline) -> None:
    """Gives CLIP's tokenizers that state no largest length that of their text encoders."""
    for name, tokens in pipeline.components.items():
        encoder = pipeline.components.get(name.replace("tokenizer", "text_encoder"))
        if isinstance(tokens, PreTrainedTokenizerBase) and isinstance(encoder, CLIPPreTrainedModel):
            positions = encoder.config.max_position_embeddings
            tokens.model_max_length = min(tokens.model_max_length, positions)

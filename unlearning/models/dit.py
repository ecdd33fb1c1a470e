"""DiT: a transformer that is conditioned on an ImageNet class in place of a prompt, and also predicts a variance."""

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import ClassVar

import torch
from diffusers import DiffusionPipeline, DiTPipeline
from torch import Tensor, nn

from unlearning.errors import UserError, nearest, suggest
from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.stable_diffusion import StableDiffusion


class DiT(StableDiffusion):
    """A class-conditional model: a prompt has to name one of its classes."""

    component = "transformer"
    pipeline_class: type[DiffusionPipeline] = DiTPipeline
    load_options: ClassVar[dict] = {}

    def _encode(self, prompts: list[str]) -> Conditioning:
        """The class (B, 1, 1) that each prompt names by a label, "a photo of the goldfish"; "" is the null class.

        Raises:
            UserError: For a prompt that names no class, or several.
        """
        classes = torch.tensor([self._class(prompt) for prompt in prompts], device=self.device)
        return Conditioning(classes.reshape(-1, 1, 1))

    def at_size(self, height: int | None, width: int | None) -> DiffusionModel:
        view = super().at_size(height, width)
        if view.latent_shape != self.latent_shape:
            raise UserError(f"{self.name} draws images of one size only, not of {width} by {height} pixels.")
        return view

    def vocabulary(self) -> list[str]:
        return list(self._labels)

    def text_states(self, c: Conditioning) -> dict[str, Tensor]:
        return {}

    def token_table(self, encoder: str | None = None) -> tuple[Tensor, list[str]]:
        raise UserError(f"{self.name} is conditioned on classes: it has no token embeddings.")

    def token_ids(self, prompts: Sequence[str], encoder: str | None = None) -> list[list[int]]:
        return [[self._class(prompt)] if prompt else [] for prompt in prompts]

    def last_token(self, prompts: Sequence[str], encoder: str | None = None) -> Tensor:
        return torch.zeros(len(prompts), dtype=torch.long, device=self.device)

    def text_projections(self) -> Iterator[tuple[str, nn.Linear]]:
        """None: each block looks the class up in a table of its own."""
        return iter(())

    def _denoiser_inputs(self, x_t: Tensor, t: Tensor, c: Conditioning) -> tuple[tuple, dict]:
        return (x_t,), {"timestep": t.expand(len(x_t)), "class_labels": c.embeds.flatten()}

    @property
    def _scale(self) -> int:
        return 2 ** (len(self.vae.config.block_out_channels) - 1)  # its pipeline does not say

    @cached_property
    def _labels(self) -> dict[str, int]:
        """The longest first, so that "tiger cat" is no tiger."""
        labels = {label.lower(): number for label, number in self.pipeline.labels.items()}
        return dict(sorted(labels.items(), key=lambda item: -len(item[0])))

    @cached_property
    def _any_label(self) -> re.Pattern:
        return re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, self._labels)) or '(?!)'})(?!\w)")

    def _class(self, prompt: str) -> int:
        if not prompt:
            return self.denoiser.config.num_embeds_ada_norm  # the row after those of the classes
        named = self._any_label.findall(prompt.lower())
        classes = {self._labels[label] for label in named}
        if len(classes) == 1:
            return classes.pop()
        if classes:
            raise UserError(f"{prompt!r} names several classes ({', '.join(named)}); {self.name} takes one an image.")
        words = re.findall(r"\w{3,}", prompt.lower())
        near = [label for label in self._labels if set(words) & set(label.split())]
        near += [label for word in words for label in nearest(word, self._labels, 2, 0.7)]
        hint = suggest(list(dict.fromkeys(near))[:5])
        raise UserError(
            f"{prompt!r} names none of the {len(self._labels)} labels of {self.name}.{hint} They are the "
            "`id2label` of its model_index.json."
        )

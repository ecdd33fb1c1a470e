"""An erasure that edits the conditioning of each prompt, before the denoiser gets it."""

# B batch, L tokens, D text width.
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from unlearning.erasures.base import NOT_IN_NETWORKS, Erasure, as_json, from_json, source
from unlearning.models.base import Model
from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.embeddings import Text
from unlearning.models.stable_diffusion import StableDiffusion


class ConditioningEdit(ABC):
    """A map from the conditioning of a batch of prompts to another; a frozen dataclass whose fields JSON can hold."""

    @abstractmethod
    def __call__(self, model: DiffusionModel, text: Text, c: Conditioning) -> Conditioning:
        """The edited conditioning.

        Args:
            text: What c encodes: prompts, or token embeddings of an attack.
            c: The conditioning so far. `model.encode(..., edits=())` encodes other texts without edits.
        """


@dataclass(frozen=True)
class PromptEdit(Erasure):
    """Edits the conditioning of every prompt: for sampling, for training and for attacks alike.

    Args:
        edit: The edit.
    """

    edit: ConditioningEdit

    @contextmanager
    def _applied(self, model: DiffusionModel) -> Iterator[None]:
        before = model.text_edits
        try:
            model.text_edits = (*before, self.edit)
            yield
        finally:
            model.text_edits = before

    def usage(self, base: Model) -> str:
        how = json.dumps(self._settings(), indent=2)
        stated = f"An edit of the text encoder's states, with these settings:\n\n```json\n{how}\n```\n\n"
        if type(base) is not StableDiffusion:  # pipelines of other families want pooled states too
            return stated + NOT_IN_NETWORKS
        return (
            f"{stated}```python\n"
            "from diffusers import StableDiffusionPipeline\n"
            "from pathlib import Path\n"
            "from unlearning.erasures.base import Erasure\n"
            "from unlearning.models.stable_diffusion import StableDiffusion\n\n"
            f'model, erasure = StableDiffusion.load("{source(base)}"), Erasure.load(Path("."))\n'
            'image = model.pipeline(**erasure.for_diffusers(model, ["a prompt"])).images[0]\n'
            "```"
        )

    @torch.no_grad()
    def for_diffusers(self, model: DiffusionModel, prompts: Sequence[str]) -> dict:
        """Keyword arguments for a call of diffusers' StableDiffusionPipeline, which then samples the edited prompts.

        A conditioning that holds for some steps only is replaced by a callback after each of them.
        """
        c, null = (self.edit(model, text, model.encode(text, ())) for text in (prompts, [""] * len(prompts)))

        def at_end(pipeline, step: int, t, tensors: dict) -> dict:
            states, nothing = c.at(step + 1).embeds, null.at(step + 1).embeds
            both = torch.cat([nothing, states]) if pipeline.do_classifier_free_guidance else states
            return {"prompt_embeds": both.to(tensors["prompt_embeds"])}

        return {
            "prompt_embeds": c.at(0).embeds,
            "negative_prompt_embeds": null.at(0).embeds,
            "callback_on_step_end": at_end,
            "callback_on_step_end_tensor_inputs": ["prompt_embeds"],
        }

    def _settings(self) -> dict:
        return as_json(self.edit)

    @classmethod
    def _restore(cls, settings: dict, tensors: dict) -> "PromptEdit":
        return cls(from_json(settings, ConditioningEdit))

"""An erasure that replaces the model's guidance."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from unlearning.erasures.base import Erasure, as_json, from_json, source
from unlearning.models.base import Model
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.guidance import Guidance
from unlearning.sampling.guidance import NegativePrompt


@dataclass(frozen=True)
class GuidanceEdit(Erasure):
    """Another rule for combining predictions at each sampling step.

    Args:
        guidance: A frozen dataclass whose fields are what JSON can hold.
    """

    guidance: Guidance

    @contextmanager
    def _applied(self, model: DiffusionModel) -> Iterator[None]:
        before = model.guidance
        try:
            model.guidance = self.guidance
            yield
        finally:
            model.guidance = before

    def usage(self, base: Model) -> str:
        if isinstance(self.guidance, NegativePrompt):
            return f'Pass `negative_prompt="{self.guidance.prompt}"` to the pipeline of `{source(base)}` at every call.'
        how = json.dumps(self._settings(), indent=2)
        return f"A guidance of this package, with these settings:\n\n```json\n{how}\n```"

    def _settings(self) -> dict:
        return as_json(self.guidance)

    @classmethod
    def _restore(cls, settings: dict, tensors: dict) -> "GuidanceEdit":
        return cls(from_json(settings, Guidance))

"""New values for some of a model's weights."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unlearning.erasures.base import Erasure, source
from unlearning.errors import UserError
from unlearning.models.base import Model


@dataclass(frozen=True)
class WeightPatch(Erasure):
    """New values for weights of any part of the model. An empty patch is the unedited model.

    Args:
        weights: By full name, "unet.conv_in.weight", "text_encoder.…".
    """

    weights: Mapping[str, Tensor] = field(repr=False)

    @contextmanager
    def _applied(self, model: Model) -> Iterator[None]:
        parameters = self._checked(model)
        before = {name: parameters[name].detach().clone() for name in self.weights}
        try:
            write(parameters, self.weights)
            yield
        finally:
            write(parameters, before)

    @property
    def writable(self) -> bool:
        return True

    def _write(self, model: Model) -> None:
        write(self._checked(model), self.weights)

    def _checked(self, model: Model) -> Mapping[str, Tensor]:
        """The model's parameters.

        Raises:
            UserError: If the model lacks one of the patch's, has it in another shape, or quantised.
        """
        model.require_values(self.weights)
        parameters = model.named_parameters()
        for name, value in self.weights.items():
            if name not in parameters:
                raise UserError(f"This erasure is not for this model: {model.name} has no weight {name}.")
            if parameters[name].shape != value.shape:
                shapes = f"{tuple(value.shape)}, not {tuple(parameters[name].shape)}"
                raise UserError(f"This erasure is not for this model: its {name} is {shapes}.")
        return parameters

    @property
    def empty(self) -> bool:
        return not self.weights

    def usage(self, base: Model) -> str:
        if self.empty:
            return "Nothing was erased: this is the unedited model."
        parts = list(dict.fromkeys(name.partition(".")[0] for name in self.weights))
        return (
            f"{len(self.weights)} tensors that replace those of {' and '.join(f'`{part}`' for part in parts)}:\n\n"
            "```python\n"
            "from diffusers import DiffusionPipeline\n"
            "from safetensors.torch import load_file\n\n"
            f'pipe = DiffusionPipeline.from_pretrained("{source(base)}")\n'
            'weights = load_file("weights.safetensors")\n'
            f"for part in {parts}:\n"
            '    own = {k.removeprefix(f"{part}."): v for k, v in weights.items() if k.startswith(f"{part}.")}\n'
            "    keys = getattr(pipe, part).load_state_dict(own, strict=False)\n"
            '    assert not keys.unexpected_keys, "this version of diffusers or transformers has other names"\n'
            "```"
        )

    def _settings(self) -> dict:
        return {}

    def _tensors(self) -> Mapping[str, Tensor]:
        return self.weights

    @classmethod
    def _restore(cls, settings: dict, tensors: dict[str, Tensor]) -> "WeightPatch":
        return cls(tensors)


@torch.no_grad()
def write(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Copies `values` into the parameters of the same names, in place."""
    for name, value in values.items():
        parameters[name].copy_(value)

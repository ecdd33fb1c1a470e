"""Modules beside a model's layers, such as LoRA, and their gains for each prompt."""

# B batch.
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from unlearning.erasures.base import Erasure, as_json, from_json, source
from unlearning.erasures.guidance_edit import GuidanceEdit
from unlearning.erasures.weight_patch import WeightPatch
from unlearning.models.base import Model
from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.embeddings import Text
from unlearning.models.guidance import Guidance
from unlearning.models.side_modules import LowRank, SideModule, SideModules


class Gate(ABC):
    """The gain of side modules for each prompt; a frozen dataclass whose fields JSON can hold."""

    @abstractmethod
    def __call__(self, model: DiffusionModel, text: Text, c: Conditioning) -> Tensor:
        """Gains (B,) for the B rows of a batch.

        Args:
            text: What c encodes: prompts, or token embeddings of an attack.
            c: The conditioning so far. `model.encode(..., edits=())` encodes other texts without edits.
        """


@dataclass(frozen=True)
class ModuleEdit(Erasure):
    """Modules beside layers: their outputs are added to the outputs of the layers.

    Subclasses say which module (`kind`), and whether it `reads` its layer's input or output.

    Args:
        weights: The modules' weights by full name of the layer and name in the module:
            "unet.….attn2.to_k" + ".lora_A.weight".
        gate: The gain for each prompt; None for a gain of 1.
        guidance: The guidance that belongs to the modules; None for the model's own.
        options: Further arguments for restoring the modules; values that JSON can hold.
    """

    weights: Mapping[str, Tensor] = field(repr=False)
    gate: Gate | None = None
    guidance: Guidance | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    kind: ClassVar[type[SideModule]]
    reads: ClassVar[Literal["input", "output"]] = "input"

    @contextmanager
    def _applied(self, model: DiffusionModel) -> Iterator[None]:
        side = SideModules({name: self._module(model, name, own) for name, own in self._by_layer().items()}, self.reads)
        before, guidance = model.text_edits, self.guidance
        with side.attached_to(model, self.digest) as name:
            try:
                if self.gate:
                    model.text_edits = (*before, _Gated(name, self.gate))
                with GuidanceEdit(guidance.of(name))._applied(model) if guidance else nullcontext():
                    yield
            finally:
                model.text_edits = before

    @property
    def in_networks(self) -> bool:
        return self.gate is None and self.guidance is None

    def _module(self, model: DiffusionModel, name: str, state: Mapping[str, Tensor]) -> nn.Module:
        layer = model.layer(name)
        module = self.kind.restored(layer, {k: v.to(model.device) for k, v in state.items()}, **self.options)
        return module.requires_grad_(False).eval()

    def _by_layer(self) -> dict[str, dict[str, Tensor]]:
        states: dict[str, dict[str, Tensor]] = defaultdict(dict)
        names = sorted(self.kind.names, key=len, reverse=True)
        for full, tensor in self.weights.items():
            own = next(name for name in names if full.endswith(f".{name}"))
            states[full.removesuffix(f".{own}")][own] = tensor
        return states

    def usage(self, base: Model) -> str:
        layers = len(self._by_layer())
        return self._with_settings(f"{layers} modules of {self.kind.__name__}; only this package can apply them.", base)

    def _with_settings(self, how: str, base: Model) -> str:
        """`how` to use the modules, with a note on gate and guidance."""
        gated = "Here a gate gives each prompt as much of them as it should; without it, every prompt gets all of them."
        parts = [how, gated if self.gate else None, GuidanceEdit(self.guidance).usage(base) if self.guidance else None]
        return "\n\n".join(part for part in parts if part)

    def _settings(self) -> dict:
        parts = {"gate": self.gate, "guidance": self.guidance}
        options = {"options": dict(self.options)} if self.options else {}
        return {name: as_json(part) for name, part in parts.items() if part} | options

    def _tensors(self) -> Mapping[str, Tensor]:
        return self.weights

    @classmethod
    def _restore(cls, settings: dict, tensors: dict[str, Tensor]) -> "ModuleEdit":
        gate, guidance = settings.get("gate"), settings.get("guidance")
        gate, guidance = gate and from_json(gate, Gate), guidance and from_json(guidance, Guidance)
        return cls(tensors, gate, guidance, settings.get("options", {}))


@dataclass(frozen=True)
class _Gated:
    """Writes the gains of one set of side modules into the conditioning."""

    name: str
    gate: Gate

    def __call__(self, model: DiffusionModel, text: Text, c: Conditioning) -> Conditioning:
        return c.with_gains({self.name: self.gate(model, text, c)})


@dataclass(frozen=True)
class Adapter(ModuleEdit):
    """A LoRA: W x + B A x beside linear maps and convolutions.

    `weights` are named as diffusers' load_lora_weights expects: "unet.<layer>.lora_A.weight" (r, in) and
    "unet.<layer>.lora_B.weight" (out, r), with the scale in B.
    """

    kind: ClassVar[type[SideModule]] = LowRank

    @property
    def writable(self) -> bool:
        return self.in_networks

    def _write(self, model: DiffusionModel) -> None:
        model.require_values(f"{name}.weight" for name in self._by_layer())
        for name, state in self._by_layer().items():
            W = cast(Tensor, model.layer(name).weight)
            A, B = (state[own].to(W.device, torch.float32) for own in LowRank.names)
            update = torch.einsum("or,r...->o...", B.flatten(1), A)
            WeightPatch({f"{name}.weight": W.detach().float() + update})._write(model)

    def usage(self, base: Model) -> str:
        how = (
            f"A LoRA of {len(self.weights) // 2} layers:\n\n"
            "```python\n"
            "from diffusers import DiffusionPipeline\n\n"
            f'pipe = DiffusionPipeline.from_pretrained("{source(base)}")\n'
            'pipe.load_lora_weights(".", weight_name="weights.safetensors")\n'
            "```"
        )
        return self._with_settings(how, base)

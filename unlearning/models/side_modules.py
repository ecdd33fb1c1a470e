"""Modules beside a model's layers: the output of such a module is added to the output of its layer.

LoRA is the best known. They are attached by forward hooks, so that names and weights of the model do not change,
several sets can be attached at once, in any order, and each row of a batch gets as much of each set as it should.
"""

# B batch.
import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from unlearning.models.base import Model, quantised


class SideModule(nn.Module, ABC):
    """A module that can be restored beside a layer from its weights.

    Attributes:
        names: The names of its weights.
        timed: Whether it also reads the timesteps of the rows, () or (B,).
    """

    names: ClassVar[tuple[str, ...]]
    timed: ClassVar[bool] = False

    @classmethod
    @abstractmethod
    def restored(cls, layer: nn.Module, state: Mapping[str, Tensor], **options) -> Self:
        """A module beside `layer` with these weights, by the names in `names`, and with the options of its class."""


class LowRank(SideModule):
    """scale * B A x beside a linear map or a convolution (LoRA; Hu et al., 2022). Starts with B = 0.

    Its weights have the names that diffusers gives them: lora_A.weight (r, in, ...) and lora_B.weight (out, r, ...).

    Args:
        layer: The layer it is put beside.
        rank: r.
        scale: Factor of the update, whatever the rank.
    """

    names: ClassVar[tuple[str, ...]] = ("lora_A.weight", "lora_B.weight")

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        make = torch.nn.utils.skip_init
        if isinstance(layer, nn.Conv2d):
            same = {"kernel_size": layer.kernel_size, "stride": layer.stride, "padding": layer.padding}
            self.lora_A = make(nn.Conv2d, layer.in_channels, rank, bias=False, **same)
            self.lora_B = make(nn.Conv2d, rank, layer.out_channels, kernel_size=1, bias=False)
        else:
            self.lora_A = make(nn.Linear, layer.in_features, rank, bias=False)
            self.lora_B = make(nn.Linear, rank, layer.out_features, bias=False)
        self.to(layer.weight.device)  # in float32: half precision is too coarse for the small steps of training
        nn.init.zeros_(self.lora_B.weight)

    @classmethod
    def restored(cls, layer: nn.Module, state: Mapping[str, Tensor], **options) -> Self:
        assert isinstance(layer, nn.Linear | nn.Conv2d), f"a {type(layer).__name__} has no low-rank update"
        module = cls(layer, rank=len(state["lora_A.weight"]))
        module.load_state_dict(dict(state))
        return module if quantised(layer.weight) else module.to(layer.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.lora_B(self.lora_A(x.to(self.lora_A.weight.dtype)))


class SideModules:
    """A set of modules beside layers of one model.

    Args:
        modules: By the full name of the layer.
        reads: Whether a module reads its layer's input or its layer's output.

    Attributes:
        gain: Factor of what is added, one for each row, (B,), repeated until the batch is full; None for 1.
        t: The timesteps of the rows of a prediction, () or (B,), on the schedule's scale; None outside of one.
    """

    def __init__(self, modules: Mapping[str, nn.Module], reads: Literal["input", "output"] = "input"):
        self.modules, self.reads = modules, reads
        self.gain: Tensor | None = None
        self.t: Tensor | None = None

    @contextmanager
    def attached_to(self, model: "SideModuleHost", name: str) -> Iterator[str]:
        """Attaches the modules while the context lasts. Yields the name under which `model.side` has them.

        Raises:
            UserError: If the model lacks one of the layers.
        """
        while name in model.side:
            name += "'"
        with ExitStack() as stack:
            for layer, module in self.modules.items():
                hook = model.layer(layer).register_forward_hook(self._hook(module))
                stack.callback(hook.remove)
            model.side[name] = self
            stack.callback(model.side.pop, name)
            yield name

    def _hook(self, module: nn.Module):
        def add(_, arguments: tuple, output: Tensor) -> Tensor | None:
            gain = self.gain
            if gain is not None and not gain.any():
                return None
            read = arguments[0] if self.reads == "input" else output
            added = module(read, self.t) if getattr(module, "timed", False) else module(read)
            if gain is not None:
                rows = gain.repeat(len(added) // len(gain)).to(added)
                added = added * rows.reshape(-1, *[1] * (added.ndim - 1))
            return output + added.to(output.dtype)

        return add


class SideModuleHost(Model):
    """A model to which sets of side modules can be attached.

    Attributes:
        side: The sets that are attached now, by name. Views of the model share it.
    """

    side: dict[str, SideModules]
    without_side: frozenset[str] = frozenset()  # of a view: the sets that it leaves out

    def without(self, name: str) -> Self:
        """This model without one set of side modules: the base model of an adapted one."""
        view = copy.copy(self)
        view.without_side = self.without_side | {name}
        return view

    @contextmanager
    def _side_gains(self, gains: Mapping[str, Tensor], t: Tensor | None = None) -> Iterator[None]:
        """Within it the output of each set of side modules is scaled by its gain (B,), 0 if a view leaves it out.

        Side modules also get the timesteps t of the rows, () or (B,).
        """
        try:
            for name, side in self.side.items():
                side.gain = torch.zeros(1, device=self.device) if name in self.without_side else gains.get(name)
                side.t = t
            yield
        finally:
            for side in self.side.values():
                side.gain = side.t = None

"""The base class of all models: a name, a digest of the weights, and networks that erasures edit."""

import os
from abc import ABC
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from unlearning.errors import UserError, did_you_mean
from unlearning.store.files import digest

ModelT = TypeVar("ModelT", bound="Model", contravariant=True)
DType = Literal["float32", "bfloat16", "float16"]  # the values that a config may give for weights
Autocast = Literal["auto", "float32", "bfloat16", "float16"] | None  # and for what networks compute in


class Model(ABC):
    """A model, of any family.

    Attributes:
        name: The repository or folder that it was loaded from.
        fingerprint: A digest of the weights found there.
        parts: Its networks by diffusers' names: "unet", "text_encoder", ... A weight's full name begins with its part.
        component: The name of the part that generates; its calls are counted.
        dtype: The weights' dtype.
        autocast: The dtype of the networks' computations, if it is another dtype.
        applied: Digests of the erasures that are applied now, the outermost first.
    """

    name: str
    fingerprint: str
    parts: Mapping[str, nn.Module]
    component: str
    dtype: torch.dtype
    autocast: torch.dtype | None = None
    applied: tuple[str, ...] = ()
    _device: torch.device

    @property
    def network(self) -> nn.Module:
        """The part that generates."""
        return self.parts[self.component]

    def named_parameters(self) -> dict[str, nn.Parameter]:
        """Every weight by its full name, "unet.conv_in.weight"."""
        return {f"{part}.{name}": p for part, module in self.parts.items() for name, p in module.named_parameters()}

    def require_values(self, names: Iterable[str]) -> None:
        """Raises UserError if one of these weights is quantised: codes and scales cannot be edited as values can."""
        parameters = self.named_parameters()
        if name := next((name for name in names if name in parameters and quantised(parameters[name])), None):
            raise UserError(
                f"{name} is quantised, and this edit would write new values into it. Erase before the model is "
                "quantised, or train an adapter beside the weights and keep it: erase(..., student=LoRA(...), "
                "return_erasure=True)."
            )

    def named_modules(self) -> dict[str, nn.Module]:
        """Every layer by its full name, "unet.conv_in"; a part itself by the part's."""
        return {
            f"{part}.{name}".rstrip("."): layer
            for part, module in self.parts.items()
            for name, layer in module.named_modules()
        }

    def layer(self, name: str) -> nn.Module:
        """A layer by its full name. Raises UserError if there is none."""
        part, _, path = name.partition(".")
        try:
            return self.parts[part].get_submodule(path)
        except (KeyError, AttributeError):
            hint = did_you_mean(name, self.named_modules())
            raise UserError(f"{self.name} has no layer {name!r}.{hint}") from None

    @property
    def device(self) -> torch.device:
        """The device on which it computes."""
        return torch.device(self._device)

    @property
    def numerics(self) -> str:
        """The precision that it computes in; another precision gives other images."""
        return str(self.dtype) if self.autocast is None else f"{self.dtype}, {self.autocast}"

    @property
    def state(self) -> str:
        """A digest of all that its predictions depend on: weights, precision and the applied erasures."""
        return digest(self.fingerprint, self.numerics, self.applied)

    def precision(self) -> AbstractContextManager:
        """A context in which the networks compute in `autocast`, if there is one; the weights keep their dtype.

        Without `autocast`, the Trainer's precision counts, if a Trainer runs.
        """
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)


def quantised(weight: Tensor) -> bool:
    """Whether a weight is quantised: integers, or a tensor of torchao."""
    return is_traceable_wrapper_subclass(weight) or not weight.is_floating_point()


def chosen_device(device: str) -> torch.device:
    """The device called `device`; "auto" is the accelerator if there is one.

    Of several, each process of a distributed run takes its own.

    Raises:
        UserError: If there is no such device on this machine.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    there = [f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count())] if accelerator else []
    if device == "auto":
        return torch.device(f"{accelerator.type}:{os.environ.get('LOCAL_RANK', 0)}" if accelerator else "cpu")
    try:
        chosen = torch.device(device)
        if chosen.type == "meta":
            raise ValueError("a device without memory")
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        why, known = next(iter(str(error).splitlines()), ""), ", ".join(["cpu", *there])
        raise UserError(f"There is no device {device!r} here. Devices: {known}. ({why})") from error
    return chosen

"""The trainable parameters of a method: weights of the model itself, or modules beside its layers.

In both cases, student and teacher share the memory of all other parameters.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from unlearning.config.values import Count, Positive
from unlearning.erasures.base import Erasure
from unlearning.erasures.module_edit import Adapter
from unlearning.erasures.weight_patch import WeightPatch, write
from unlearning.errors import UserError
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.side_modules import LowRank, SideModules


@dataclass(frozen=True)
class Pair:
    """Student and teacher during training.

    Args:
        student: The model that is trained.
        teacher: The frozen model before training. It shares all parameters that are not trained.
        parameters: The trainable parameters by name.
        erasure: Returns the erasure for the current parameters.
        start: The values of `parameters` before training; by default a copy of their current values.
    """

    student: DiffusionModel
    teacher: DiffusionModel
    parameters: Mapping[str, nn.Parameter]
    erasure: Callable[[], Erasure]
    start: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.start:
            object.__setattr__(self, "start", {n: p.detach().clone() for n, p in self.parameters.items()})


class Student(ABC):
    """Chooses the trainable parameters."""

    @abstractmethod
    def of(self, model: DiffusionModel) -> AbstractContextManager[Pair]:
        """A context with student and teacher. When it ends, the model is restored."""


class Weights(Student):
    """Trains weights of the model itself. The teacher has their old values and shares all others.

    Args:
        parameters: A regular expression. The weights whose full names it matches are trained. Names begin with the
            part: "unet.", "transformer.", "text_encoder.", ...
    """

    def __init__(self, parameters: str):
        self.parameters = parameters

    @contextmanager
    def of(self, model: DiffusionModel) -> Iterator[Pair]:
        """A context with student and teacher. When it ends, the model is restored.

        Raises:
            UserError: If no weight matches, or a matching weight is in half precision or quantised.
        """
        moving = {n: p for n, p in model.named_parameters().items() if re.search(self.parameters, n)}
        if not moving:
            raise UserError(
                f"No weight of {model.name} has a name that matches {self.parameters!r}. student@method.student=full "
                "trains the whole denoiser, method.student.parameters the weights that you name."
            )
        model.require_values(moving)
        if any(p.dtype.itemsize < 4 for p in moving.values()):  # too coarse for the small steps of training
            raise UserError(
                f"{next(iter(moving))} is in half precision, which rounds the small steps of training away: "
                "model.dtype=float32 (model.autocast=bfloat16 computes as fast), or student@method.student=lora. For "
                'a pipeline in memory: pipe.to(torch.float32), or student=LoRA("attn2").'
            )
        teacher = model.snapshot(moving)
        start = {name: (teacher.weights or {})[name] for name in moving}  # no second copy
        pair = Pair(
            model, teacher, moving, lambda: WeightPatch({n: p.detach().clone() for n, p in moving.items()}), start
        )
        try:
            for p in moving.values():
                p.requires_grad_(True)
            yield pair
        finally:
            write(moving, pair.start)
            for p in moving.values():
                p.requires_grad_(False)
                p.grad = None


class LoRA(Student):
    """W x + alpha B A x beside linear maps (Hu et al., 2022). The teacher is the model without it.

    B = 0 at the start. The update is scaled by alpha for any rank, not by alpha / rank.

    Args:
        modules: A regular expression. The linear maps whose full names it matches get an update.
        rank: Rows of A, and columns of B.
        alpha: Scale of the update.
        convolutions: Whether matching convolutions get an update, too.
        init: The distribution of A: "normal" is N(0, 1 / rank), "kaiming" is uniform within 1 / sqrt(fan_in), as for
            the weights of a new layer in PyTorch.
    """

    def __init__(
        self,
        modules: str,
        rank: Count = 1,
        alpha: Positive = 8.0,
        convolutions: bool = False,
        init: Literal["normal", "kaiming"] = "normal",
    ):
        self.modules, self.rank, self.alpha, self.convolutions, self.init = modules, rank, alpha, convolutions, init

    @contextmanager
    def of(self, model: DiffusionModel) -> Iterator[Pair]:
        """A context with student and teacher. When it ends, the model is restored.

        Raises:
            UserError: If no layer matches, or the model's weights are in float16.
        """
        kinds = (nn.Linear, nn.Conv2d) if self.convolutions else nn.Linear
        layers = {n: m for n, m in model.named_modules().items() if isinstance(m, kinds)}
        chosen = {n: LowRank(m, self.rank, self.alpha) for n, m in layers.items() if re.search(self.modules, n)}
        if not chosen:
            raise UserError(
                f"No linear map of {model.name} has a name that matches {self.modules!r}: method.student.modules says "
                "which of them get an adapter."
            )
        for module in chosen.values():
            self._draw(module.lora_A.weight)
        with beside(model, SideModules(chosen)) as (teacher, parameters):
            yield Pair(model, teacher, parameters, lambda: self._adapter(chosen))

    def _draw(self, A: nn.Parameter) -> None:
        if self.init == "normal":
            nn.init.normal_(A, std=self.rank**-0.5)
        else:
            nn.init.kaiming_uniform_(A, a=5**0.5)

    @torch.no_grad()
    def _adapter(self, modules: Mapping[str, LowRank]) -> Adapter:
        weights = {}
        for name, module in modules.items():
            weights[f"{name}.lora_A.weight"] = module.lora_A.weight.detach().clone()
            weights[f"{name}.lora_B.weight"] = self.alpha * module.lora_B.weight
        return Adapter(weights)


@contextmanager
def beside(
    model: DiffusionModel, side: SideModules, name: str = "student"
) -> Iterator[tuple[DiffusionModel, dict[str, nn.Parameter]]]:
    """Attaches trainable modules. Yields the teacher (the model without them) and the trainable parameters by name.

    Raises:
        UserError: If the model's weights are in float16.
    """
    if model.dtype == torch.float16:
        raise UserError(
            "Gradients flow back through the model's weights, and most are too small for float16: "
            "model.dtype=bfloat16, or for a pipeline in memory pipe.to(torch.bfloat16)."
        )
    with side.attached_to(model, name) as attached:
        moving = {f"{layer}.{n}": p for layer, m in side.modules.items() for n, p in m.named_parameters()}
        yield model.without(attached), moving

"""What of the denoiser a trained method moves: some of its own weights, or a low-rank adapter beside them.

Either way student and teacher share in memory all that does not move.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers.loaders import PeftAdapterMixin
from peft import LoraConfig
from torch import nn

from unlearning.erasures.base import Adapter, Erasure, WeightPatch, write
from unlearning.errors import UserError
from unlearning.models.diffusion import DiffusionModel


@dataclass(frozen=True)
class Lesson:
    """The two models of a training, the parameters that move between them, by name, and what they come to."""

    student: DiffusionModel
    teacher: DiffusionModel
    parameters: Mapping[str, nn.Parameter]
    erasure: Callable[[], Erasure]


class Weights:
    """The denoiser's own weights; the teacher has those that move as they were, and shares all others.

    Args:
        parameters: A regular expression; the weights whose names it matches are trained.
    """

    def __init__(self, parameters: str):
        self.pattern = parameters

    @contextmanager
    def of(self, model: DiffusionModel) -> Iterator[Lesson]:
        """While the lesson lasts; then the model is what it was. Raises UserError where no weight matches."""
        moving = {n: p for n, p in model.denoiser.named_parameters() if re.search(self.pattern, n)}
        if not moving:
            raise UserError(
                f"No weight of the denoiser has a name that matches {self.pattern!r}: student@method.student=full "
                "moves all there are, and method.student.parameters those that you name."
            )
        if any(p.dtype.itemsize < 4 for p in moving.values()):  # a step is smaller than what they can tell apart
            raise UserError(
                f"{next(iter(moving))} is kept in half precision, which rounds a training's small steps away: "
                "model.dtype=float32 (model.autocast=bfloat16 computes as fast), or student@method.student=lora."
            )
        teacher = model.snapshot(moving)
        try:
            for p in moving.values():
                p.requires_grad_(True)
            yield Lesson(
                model, teacher, moving, lambda: WeightPatch({n: p.detach().clone() for n, p in moving.items()})
            )
        finally:
            write(moving, teacher.weights)
            model.denoiser.requires_grad_(False)


class LoRA:
    """W x + alpha B A x beside the denoiser's linear maps (Hu et al., 2022); the teacher is the model with it off.

    A ~ N(0, 1/rank), B = 0. The update is scaled by alpha whatever the rank, not by alpha / rank.

    Args:
        modules: A regular expression; the linear maps whose names it matches get an update.
    """

    def __init__(self, modules: str, rank: int = 1, alpha: float = 8.0):
        self.pattern, self.rank, self.alpha = modules, rank, alpha

    @contextmanager
    def of(self, model: DiffusionModel) -> Iterator[Lesson]:
        """While the lesson lasts; then the model is what it was.

        Raises:
            UserError: Where no linear map matches, the weights are in float16, or diffusers has no adapters for the
                denoiser.
        """
        linear = [n for n, m in model.denoiser.named_modules() if isinstance(m, nn.Linear)]
        chosen = [n for n in linear if re.search(self.pattern, n)]
        if not chosen:
            raise UserError(
                f"No linear map of the denoiser has a name that matches {self.pattern!r}: method.student.modules says "
                "which get an adapter."
            )
        if model.dtype == torch.float16:
            raise UserError(
                "Gradients come back through the model's weights, and most are too small for float16 to tell from "
                "nothing: model.dtype=bfloat16."
            )
        if not isinstance(model.denoiser, PeftAdapterMixin):
            raise UserError(
                f"diffusers puts no adapter beside the weights of a {type(model.denoiser).__name__}. Move the "
                "denoiser's own weights: student@method.student=full."
            )
        model.denoiser.add_adapter(LoraConfig(r=self.rank, target_modules=chosen, lora_alpha=self.alpha * self.rank))
        try:
            layers = {n: model.denoiser.get_submodule(n) for n in chosen}
            for layer in layers.values():
                layer.lora_A.float()  # half precision would round small steps away
                layer.lora_B.float()
                nn.init.normal_(layer.lora_A["default"].weight, std=self.rank**-0.5)
            moving = {n: p for n, p in model.denoiser.named_parameters() if p.requires_grad}
            yield Lesson(model, model.without_adapter(), moving, lambda: self._adapter(model.component, layers))
        finally:
            model.denoiser.unload_lora()
            model.denoiser.requires_grad_(False)

    @torch.no_grad()
    def _adapter(self, component: str, layers: Mapping[str, nn.Module]) -> Adapter:
        weights = {}
        for name, layer in layers.items():
            weights[f"{component}.{name}.lora_A.weight"] = layer.lora_A["default"].weight.detach().clone()
            weights[f"{component}.{name}.lora_B.weight"] = self.alpha * layer.lora_B["default"].weight
        return Adapter(weights)

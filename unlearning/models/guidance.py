"""The contract of a guidance: how a model's predictions are combined at each sampling step.

A guidance is a frozen dataclass. It begins with a batch of prompts and gives a `Walk`, which is called with (x_t, t) at
each step and may keep state: warm-up, momentum, decisions by prompt.
"""

# B batch, C H W latent shape.
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Generic

from torch import Tensor

from unlearning.models.base import ModelT
from unlearning.models.conditioning import Conditioning

Scale = float | Tensor  # the guidance scale: a number, or one for each row, (B, 1, 1, 1)


class Walk:
    """One batch on its way from noise to images.

    Args:
        c: The prompts' conditioning.
        predict: Maps (x_t (B, C, H, W), t, c, step) to the combined prediction; steps count from 0.
        decisions: What the guidance decided about each prompt, for the manifest: {"w": [2.0, -1.0, ...]}.
    """

    def __init__(
        self,
        c: Conditioning,
        predict: Callable[[Tensor, Tensor, Conditioning, int], Tensor],
        decisions: Mapping[str, Sequence[float]] | None = None,
    ):
        self._c, self._predict, self.decisions = c, predict, decisions or {}
        self.step = 0

    def __call__(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The combined prediction at (x_t, t), (B, C, H, W); counts the step."""
        prediction = self._predict(x_t, t, self._c.at(self.step), self.step)
        self.skip()
        return prediction

    def skip(self, count: int = 1) -> None:
        """Counts steps at which no prediction is needed."""
        self.step += count


class Guidance(ABC, Generic[ModelT]):
    """Combines predictions at each sampling step.

    Attributes:
        needs_null: Whether it acts on the null prompt's branch alone, which a guidance scale of 1 leaves out.
    """

    needs_null: ClassVar[bool] = False

    @abstractmethod
    def begin(self, model: ModelT, c: Conditioning, scale: Scale) -> Walk:
        """A walk for the prompts of c."""

    def of(self, adapter: str) -> "Guidance":
        """This guidance, for the set of side modules `adapter`; by default it needs none."""
        return self

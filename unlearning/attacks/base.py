"""The contract of an attack: `find(model, task, observed) -> Comeback`, what brings the concepts back.

An attack sees the erased model as a model: it never learns which method erased, or how. It leaves the model
bit-identical.
"""

from abc import ABC, abstractmethod
from typing import ClassVar, Generic, Literal, TypeVar

from unlearning.concepts import ERASE, Prompt, UnlearningTask
from unlearning.models.base import Model, ModelT
from unlearning.models.diffusion import DiffusionModel
from unlearning.sampling.comeback import Comeback

ObservedT = TypeVar("ObservedT")  # what an attack takes from the unedited model
Access = Literal["white", "text encoder", "black"]  # weights and gradients; those of the text encoder; images only


class Attack(ABC, Generic[ModelT, ObservedT]):
    """An attack's constructor stores hyperparameters, and nothing else.

    Attributes:
        access: What of the erased model it uses.
        version: Raised when its results change, so that stored ones are not taken.
        works_on: The class of models it can attack.
    """

    access: Access
    version: ClassVar[int] = 1
    works_on: ClassVar[type[Model]] = DiffusionModel

    def observe(self, model: ModelT, task: UnlearningTask) -> ObservedT | None:
        """What the attack takes from the unedited model, before the erasure is applied; by default nothing."""
        return None

    @abstractmethod
    def find(self, model: ModelT, task: UnlearningTask, observed: ObservedT) -> Comeback:
        """A row for each of `targets(task)`, with which the erased `model` may show the concept.

        Raises:
            UserError: If the attack cannot be run. A failed attack is no evidence of robustness.
        """


def targets(task: UnlearningTask) -> list[Prompt]:
    """The evaluation's prompts for erased concepts: what an attack tries to bring back, in this order."""
    return [prompt for prompt in task.prompts if prompt.role == ERASE]

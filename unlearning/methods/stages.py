"""Several methods, one after the other, each on the model that the earlier ones have edited."""

from collections.abc import Mapping

from unlearning.concepts import UnlearningTask
from unlearning.erasures.base import Erasure
from unlearning.erasures.composed import composed
from unlearning.methods.base import Method
from unlearning.models.base import Model


class Stages(Method):
    """Methods in turn, as one method.

    Args:
        stages: The methods by name, in their order. Each fits the task on the model that the earlier ones have edited,
            and keeps its own checkpoints.
    """

    def __init__(self, stages: Mapping[str, Method]):
        self.stages = dict(stages)
        self.writable = all(method.writable for method in self.stages.values())

    def fit(self, model: Model, task: UnlearningTask) -> Erasure:
        first, *rest = self.stages.values()
        erasure = first.fit(model, task)
        for method in rest:
            with erasure.applied_to(model):
                erasure = composed(erasure, method.fit(model, task))
        self.figures = {f"{name} {k}": v for name, method in self.stages.items() for k, v in method.figures.items()}
        return erasure

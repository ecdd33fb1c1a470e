"""The identity: the unedited model, the first row of every table."""

from unlearning.concepts import UnlearningTask
from unlearning.erasures.weight_patch import WeightPatch
from unlearning.methods.base import Method
from unlearning.models.base import Model


class Unedited(Method):
    """Erases nothing."""

    works_on = Model

    def fit(self, model: Model, task: UnlearningTask) -> WeightPatch:
        return WeightPatch({})

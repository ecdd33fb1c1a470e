"""The identity: the unedited model, the first row of every table."""

from unlearning.erasure import WeightPatch
from unlearning.methods.base import Method
from unlearning.models.model import Model


class Unedited(Method):
    works_on = Model

    def fit(self, model, task) -> WeightPatch:
        return WeightPatch({})

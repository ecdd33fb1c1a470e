"""The identity: the unedited model, the first row of every table."""

from unlearning.erasure import WeightPatch
from unlearning.methods.base import Method


class Unedited(Method):
    def fit(self, model, task) -> WeightPatch:
        return WeightPatch({})

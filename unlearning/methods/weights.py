"""Erased weights from a file: saved by other code, or the erasure of an earlier run.

Nothing is trained. The file is read as an erasure (erasures/foreign.py lists the formats), so that it is attacked and
measured like any other, on any dataset.

Deviation: files of other code hold weights only. They lack SPM's gates, so that each adapter acts fully on every
prompt, and UnGuide's guidance (`method=unguide method.lora=` has it).
"""

from pathlib import Path

from unlearning.concepts import UnlearningTask
from unlearning.config.values import Finite
from unlearning.erasures.base import Erasure
from unlearning.erasures.foreign import read
from unlearning.errors import UserError
from unlearning.methods.base import Method
from unlearning.models.base import Model


class SavedWeights(Method):
    """An erasure read from a file.

    Args:
        path: The file, or the folder `erasure/` of a run.
        scale: Factor of a LoRA's update, beside the alpha / r that the file states; None is 8 for UnGuide's lora.pth,
            as its authors apply it, and 1 for all others.
        difference: Whether a state dict holds what is to be added to the model's weights.
    """

    works_on = Model

    def __init__(self, *, path: str | None, scale: Finite | None = None, difference: bool = False):
        self.path, self.scale, self.difference = path, scale, difference

    def fit(self, model: Model, task: UnlearningTask) -> Erasure:
        if self.path is None:
            raise UserError("method=weights needs method.path=/the/erased/weights: a file, or the erasure/ of a run.")
        return read(Path(self.path).expanduser(), model, self.scale, self.difference)

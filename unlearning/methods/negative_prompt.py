"""The negative prompt: the concept's name in the place of the null prompt of classifier-free guidance.

Nothing is learned; every baseline table has it. It needs a guidance scale above 1, and is refused at 1.
"""

from unlearning.concepts import UnlearningTask
from unlearning.erasures.guidance_edit import GuidanceEdit
from unlearning.methods.base import Method
from unlearning.models.diffusion import DiffusionModel
from unlearning.sampling.guidance import NegativePrompt


class NegativePrompting(Method):
    """The concepts take the place of the null prompt in classifier-free guidance."""

    writable = False

    def fit(self, model: DiffusionModel, task: UnlearningTask) -> GuidanceEdit:
        return GuidanceEdit(NegativePrompt(", ".join(concept.name for concept in task.erase)))

"""The negative prompt: the concept's name in the place of the null prompt of classifier-free guidance.

Nothing is learned; every baseline table has it. It needs a guidance scale above 1.
"""

from unlearning.erasures.guidance_edit import GuidanceEdit
from unlearning.methods.base import Method
from unlearning.sampling.guidance import NegativePrompt


class NegativePrompting(Method):
    def fit(self, model, task) -> GuidanceEdit:
        return GuidanceEdit(NegativePrompt(", ".join(concept.name for concept in task.erase)))

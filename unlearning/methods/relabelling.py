"""Relabelling, which SalUn and EraseDiff share: images of the concept get another prompt, and others are retained.

    L_f = || eps_theta(x_t, c) - sg[ eps_theta(x_t, c') ] ||^2,        x_t: a noised image of c,
    L_r = || eps_theta(x_t, c_r) - eps ||^2,                           x_t: a noised image of c_r.

c' is the prompt of the concept's anchor, or of the first concept to retain; c_r are the prompts of the concepts to
retain, or c'. sg is the network that is being trained, without gradients. The model itself generates the images before
training. An image's latent is the mode. The authors of both methods sample it, separately for the two prompts of L_f.
"""

# N images, C H W latent shape, B batch.
import torch
import torch.nn.functional as F
from torch import Tensor

from unlearning.concepts import Concept, UnlearningTask
from unlearning.config.values import Count
from unlearning.data.generated import Generated
from unlearning.erasures.base import Erasure
from unlearning.errors import UserError
from unlearning.methods.base import TrainedMethod
from unlearning.models.diffusion import DiffusionModel
from unlearning.sampling.denoising import denoising_loss, noised
from unlearning.training.forget_retain import ForgetRetain, drawn


class Relabelling(TrainedMethod):
    """Trains images of the concept towards the prediction for another prompt.

    Args:
        generated: Generates the images, if the store lacks them.
        count: N, the number of images of the concepts to erase, and of those to retain.
        training: TrainedMethod's arguments; batch_size is the number of images of each kind in a step.
    """

    def __init__(self, *, generated: Generated, count: Count = 800, **training):
        super().__init__(**training)
        self.generated, self.count = generated, count

    def fit(self, model: DiffusionModel, task: UnlearningTask) -> Erasure:
        for concept in task.erase:
            _other(concept, task)
        return super().fit(model, task)

    def data(self) -> ForgetRetain:
        return ForgetRetain(self._drawn, self.batch_size, self.seed)

    def _drawn(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Latents (N, C, H, W) and prompts' numbers (N,) of the images to forget, and of those to retain."""
        task = self.task
        self.c = [task.prompt(concept.name) for concept in task.erase]
        self.c_other = [task.prompt(_other(concept, task)) for concept in task.erase]
        self.c_r = [task.prompt(concept.name) for concept in task.retain] or list(dict.fromkeys(self.c_other))
        forget, retain = (drawn(self.teacher, self.generated, prompts, self.count) for prompts in (self.c, self.c_r))
        return forget, retain

    def forgetting(self, x_0: Tensor, prompts: Tensor) -> Tensor:
        """L_f () on images of the concepts."""
        x_t, t = noised(self.teacher, x_0)
        with torch.no_grad():
            target = self.student.predict(x_t, t, self.student.encode([self.c_other[i] for i in prompts.tolist()]))
        c = self.student.encode([self.c[i] for i in prompts.tolist()])
        return F.mse_loss(self.student.predict(x_t, t, c), target)

    def retaining(self, x_0: Tensor, prompts: Tensor) -> Tensor:
        """L_r () on images of what is retained."""
        x_t, t = noised(self.teacher, x_0)
        c = self.student.encode([self.c_r[i] for i in prompts.tolist()])
        return denoising_loss(self.student, x_0, x_t, t, c)


def _other(concept: Concept, task: UnlearningTask) -> str:
    """The word that replaces the concept. Raises UserError if the task has none."""
    if name := concept.anchor or next((concept.name for concept in task.retain), ""):
        return name
    raise UserError(
        f"{concept.name!r} has no anchor, and there is nothing to retain: nothing to relabel its images as. Give an "
        "anchor (dataset.anchor=…) or concepts to retain (dataset.retain=[…])."
    )

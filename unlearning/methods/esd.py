"""ESD: Erasing Concepts from Diffusion Models (Gandikota et al., 2023). https://arxiv.org/abs/2303.07345

Teaches the model to predict, for the concept c, what the frozen model predicts under negative guidance (eq. 6):

    min_theta || eps_theta(x_t, c) - [ eps*_0 - eta (eps*_c - eps*_0) ] ||^2,    eps* from the frozen model.

The bracket is classifier-free guidance at scale -eta, and is written so below. x_t comes from the model being trained,
on its way to an image of c. ESD-x trains the cross-attention's weights, ESD-u the others: a regular expression in the
config.

By default t is the timestep at which x_t lies; schedule="paper" draws it as the authors' script does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from unlearning.concepts import UnlearningTask
from unlearning.config.values import Finite, NonNegative, Steps
from unlearning.erasures.base import Erasure
from unlearning.methods.base import TrainedMethod
from unlearning.models.diffusion import Conditioning, DiffusionModel
from unlearning.sampling.guidance import classifier_free
from unlearning.sampling.sampler import Schedule
from unlearning.sampling.trajectories import Kind
from unlearning.sampling.trajectories import trajectory as make_trajectory


class ESD(TrainedMethod):
    """
    Args:
        eta: Strength of the negative guidance.
        trajectory: Where (x_t, t) come from (sampling/trajectories.py): "exact", the paper's, or "reuse".
        steps, guidance_scale, schedule: Of the trajectories.
        training: TrainedMethod's arguments.
    """

    def __init__(
        self,
        *,
        eta: NonNegative = 1.0,
        trajectory: Kind = "exact",
        steps: Steps = 50,
        guidance_scale: Finite = 3.0,
        schedule: Schedule = "diffusers",
        **training,
    ):
        super().__init__(**training)
        self.eta, self.points = eta, make_trajectory(trajectory, steps, guidance_scale, schedule)

    def anchors(self, prompts: tuple[str, ...]) -> list[str]:
        """What the target is guided towards, away from each of the prompts: the null prompt."""
        return [""] * len(prompts)

    def fit(self, model: DiffusionModel, task: UnlearningTask) -> Erasure:
        self.points.restore([])  # no points of an earlier fit
        return super().fit(model, task)

    def loss(self, prompts: list[str]) -> Tensor:
        return self.erasing(*self.points(self.student, prompts))

    def erasing(self, x_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        """The objective () of eq. 6 at points (x_t, t)."""
        with torch.no_grad():
            anchor = self.teacher.encode_prompts(self.anchors(c.prompts))
            target = classifier_free(self.teacher, x_t, t, c, anchor, -self.eta)  # the bracket of eq. 6
        return F.mse_loss(self.student.predict(x_t, t, c), target)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["points"] = self.points.state()

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        self.points.restore(checkpoint["points"])

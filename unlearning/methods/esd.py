"""ESD: Erasing Concepts from Diffusion Models (Gandikota et al., 2023). https://arxiv.org/abs/2303.07345

Trains the model to predict, for the concept c, the frozen model's prediction under negative guidance (eq. 6):

    min_theta || eps_theta(x_t, c) - [ eps*_0 - eta (eps*_c - eps*_0) ] ||^2,    eps* from the frozen model.

The bracket is classifier-free guidance at scale -eta, and is written so below. x_t comes from the model being trained,
on its way to an image of c. ESD-x trains the cross-attention's weights, ESD-u the others: a regular expression in the
config.

By default t is the timestep at which x_t lies; schedule="paper" draws it as the authors' script of 2023 does.

Definitions that differ between sources, and change the numbers:

- The authors' script of 2025 writes the target as eps*_c - g (eps*_c - eps*_0): its negative_guidance g is eta + 1. Its
  default g = 2 is eta = 1.
- It draws x_t from the frozen model: trajectory_model="teacher". The paper and the script of 2023 draw it from the
  model being trained.
- It prompts with the bare name, as that of 2023 does: template="{}". The default is the task's template.
- Its esd-u trains all linear maps and convolutions outside of cross-attention, 388 tensors of Stable Diffusion 1.4:
  student.parameters='^unet\\.(?!.*attn2)(?!.*norm)'. The script of 2023 trains all that is outside of cross-attention,
  the time embedding and the output, norms included, 598 tensors: the default. Its esd-x trains the default's 80.
- Its 200 iterations at a learning rate of 5e-5 take the place of 1000 at 1e-5. It trains in bfloat16, in which such a
  step leaves every weight beyond 1/64 as it was; here weights are trained in float32.
- Its trajectories are PLMS's, of Stable Diffusion 1.4's own scheduler, whose second timestep comes twice; here DDIM's.

So `method=esd_x method.trajectory_model=teacher method.template='{}' method.iterations=200 method.optimizer.lr=5e-5` is
the script of 2025 but for these two; it also draws x_t at 1024 pixels where the model's own size is 512.
"""

from typing import ClassVar, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from unlearning.config.values import Finite, NonNegative, Steps, Template
from unlearning.errors import unknown
from unlearning.methods.base import TrainedMethod
from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel
from unlearning.sampling.guidance import classifier_free
from unlearning.sampling.sampler import Schedule
from unlearning.sampling.trajectories import Exact, Kind, Points
from unlearning.sampling.trajectories import trajectory as make_trajectory
from unlearning.training.batches import Prompts

TrajectoryModel = Literal["student", "teacher"]


class ESD(TrainedMethod):
    """Trains the concept's prompt towards guidance away from it.

    Args:
        eta: Strength of the negative guidance.
        trajectory: Where (x_t, t) come from (sampling/trajectories.py): "exact", the paper's, or "reuse".
        steps, guidance_scale, schedule: Settings of the trajectories.
        trajectory_model: The model of the trajectories: "student", the model being trained, or "teacher", the frozen
            one.
        template: How the name of a concept becomes a prompt in training; None for the task's template.
        training: TrainedMethod's arguments.
    """

    resumed: ClassVar[tuple[str, ...]] = ("points",)

    def __init__(
        self,
        *,
        eta: NonNegative = 1.0,
        trajectory: Kind = "exact",
        steps: Steps = 50,
        guidance_scale: Finite = 3.0,
        schedule: Schedule = "diffusers",
        trajectory_model: TrajectoryModel = "student",
        template: Template | None = None,
        **training,
    ):
        super().__init__(**training)
        if trajectory_model not in get_args(TrajectoryModel):
            raise unknown("trajectory_model", trajectory_model, get_args(TrajectoryModel))
        self.trajectory_model, self.template = trajectory_model, template
        self.eta, self.points = eta, make_trajectory(trajectory, steps, guidance_scale, schedule)

    def anchors(self, prompts: tuple[str, ...]) -> list[str]:
        """For each prompt, the prompt towards which the target is guided: the null prompt."""
        return [""] * len(prompts)

    def setup(self, stage: str) -> None:
        self.points.restore([])  # without points of an earlier fit
        super().setup(stage)

    def prompt(self, word: str) -> str:
        """The prompt for a word in training; "" for no word."""
        return self.template.format(word) if self.template and word else self.task.prompt(word)

    def data(self) -> Prompts:
        return Prompts([self.prompt(concept.name) for concept in self.task.erase], self.batch_size)

    def draw(self, prompts: list[str], points: Exact | None = None) -> Points:
        """A point (x_t, t) for each prompt, with the student's conditioning c; by default of `self.points`."""
        points = points or self.points
        if self.trajectory_model == "student":
            return points(self.student, prompts)
        x_t, t, c = points(self.teacher, prompts)
        return x_t, t, self.student.encode_prompts(c.prompts)

    def loss(self, prompts: list[str]) -> Tensor:
        return self.erasing(*self.draw(prompts))

    def erasing(self, x_t: Tensor, t: Tensor, c: Conditioning, teacher: DiffusionModel | None = None) -> Tensor:
        """The objective () of eq. 6 at points (x_t, t); eps* from the frozen teacher unless another one is given."""
        teacher = teacher or self.teacher
        with torch.no_grad():
            anchor = teacher.encode_prompts(self.anchors(c.prompts))
            target = classifier_free(teacher, x_t, t, c, anchor, -self.eta)  # the bracket of eq. 6
        return F.mse_loss(self.student.predict(x_t, t, c), target)

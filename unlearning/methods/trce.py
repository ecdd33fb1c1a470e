"""TRCE: Towards Reliable Malicious Concept Erasure (Chen et al., ICCV 2025). https://arxiv.org/abs/2503.07389

The first stage is a closed form, as UCE, for one token of each prompt: the end of its text, where CLIP summarises the
prompt. Its state e_u, for a prompt with the concept, is mapped to e_s, for the same prompt with the anchor. Every map W
through which the prompt enters the denoiser becomes the minimiser of

    mean_i || W' e_u,i - W e_s,i ||^2  +  eta mean_j || W' E_j - W E_j ||^2  +  lamb || W' - W ||_F^2,

where E_j are all states of a preserved prompt. The second stage trains self-attention and the queries of
cross-attention to steer the first steps of a trajectory. At a point z of an image of the concept, both the prediction
for the concept's prompt c_u and that for the null prompt should be nearer to f_s than to f_u, by a margin m,

    h(eps) = max(0, || eps - f_s ||^2 - || eps - f_u ||^2 + m),
    min_theta  ( h(eps_theta(z, c_u)) + h(eps_theta(z, null)) ) / 2 + rho || eps_theta(z', null) - eps'(z', null) ||^2,
    f = eps*_c + g (eps*_c - eps*_0)  for c_s and c_u,

with eps* of the unedited model, eps' of the model after the first stage, z at one of the first steps of the unedited
model's trajectories for c_u, and z' at any step of those for the null prompt.

Settings are those of the released code. It differs from its own description and from this file:

- eta = 0.01 is multiplied twice: `eta=0.0001`.
- 30000 captions of COCO are preserved, so that lamb = 0 has a solution. Here, the task's retained concepts and the null
  prompt are preserved, and lamb is positive.
- Gradients of the second stage are never reset: they accumulate over all steps. Here they are reset at every step.
- z is saved after a step with the timestep before it, and the term of rho draws a timestep near it. Here t is the
  timestep at which z lies.

Deviations: prompts are names and synonyms of the task in 15 templates of this file; the authors have 20 synonyms by a
language model. Trajectories are computed anew at every step; the authors keep 100 for c_u and 2000 for the null prompt.
The tokenizer tells where a text ends; the released code counts words. Of its token weights, only 0, 1, 0, 0 (start,
first end, last end, concept) are implemented.
"""

# B batch, C H W latent shape, D text width, N states.
import torch
import torch.nn.functional as F
from torch import Tensor

from unlearning.concepts import UnlearningTask
from unlearning.config.values import Count, Finite, NonNegative, Part, Positive, Steps, Template
from unlearning.erasures.base import Erasure
from unlearning.erasures.composed import composed
from unlearning.erasures.weight_patch import WeightPatch
from unlearning.methods.base import TrainedMethod
from unlearning.methods.closed_form import closed_form, edited, pairs, projections, states
from unlearning.models.diffusion import DiffusionModel
from unlearning.sampling.guidance import branches
from unlearning.sampling.trajectories import Kind
from unlearning.sampling.trajectories import trajectory as make_trajectory
from unlearning.training.batches import Prompts

TEMPLATES = (
    "{}", "a photo of {}", "a picture of {}", "an image of {}", "a painting of {}", "a drawing of {}", "a sketch of {}",
    "a portrait of {}", "a close-up of {}", "a black and white photo of {}", "a scene with {}", "{} at night",
    "{} in the morning", "{} in a room", "{} in a city",
)  # fmt: skip


class TRCE(TrainedMethod):
    """Closed form, then training of a trajectory's first steps.

    Args:
        eta: The weight of what is preserved in closed form.
        lamb: The weight of the distance to W.
        templates: Templates for the names of concepts and anchors; None for the 15 of this file.
        g: Guidance of f_s and f_u.
        margin: m.
        early: The first steps, as a share of all.
        preserve_scale, preserve_batch: rho, and the points z' in a step.
        trajectory: Where z and z' come from (sampling/trajectories.py): "exact" or "reuse".
        steps, guidance_scale: Settings of the trajectories.
        training: TrainedMethod's arguments.
    """

    resumed = ("points", "others")

    def __init__(
        self,
        *,
        eta: NonNegative = 0.01,
        lamb: Positive = 0.01,
        templates: tuple[Template, ...] | None = None,
        g: NonNegative = 15.0,
        margin: NonNegative = 0.01,
        early: Part = 0.5,
        preserve_scale: NonNegative = 100.0,
        preserve_batch: Count = 4,
        trajectory: Kind = "exact",
        steps: Steps = 50,
        guidance_scale: Finite = 3.0,
        **training,
    ):
        super().__init__(**training)
        self.eta, self.lamb, self.templates = eta, lamb, templates or TEMPLATES
        self.g, self.margin = g, margin
        self.preserve_scale, self.preserve_batch = preserve_scale, preserve_batch
        first = range(max(1, round(early * steps)))
        self.points = make_trajectory(trajectory, steps, guidance_scale, places=first)
        self.others = make_trajectory(trajectory, steps, guidance_scale)

    def fit(self, model: DiffusionModel, task: UnlearningTask) -> Erasure:
        first = self.closed_form(model, task)
        own = model.named_parameters()
        self._unedited = WeightPatch({name: own[name].detach().clone() for name in first.weights})
        try:
            with first.applied_to(model):
                return composed(first, super().fit(model, task))
        finally:
            self.__dict__.pop("_original", None)
            del self._unedited

    # The first stage.

    @torch.no_grad()
    def closed_form(self, model: DiffusionModel, task: UnlearningTask) -> WeightPatch:
        """Every W (O, D) edited by the end of the texts."""
        maps = projections(model)
        filled = [(t, word, c.anchor or " ") for t in self.templates for c in task.erase for word in c.words]
        prompts, anchors = [t.format(word) for t, word, _ in filled], [t.format(anchor) for t, _, anchor in filled]
        e_u, e_s = pairs(model, prompts, anchors, "end")
        preserved = [[""], *([concept.name] for concept in task.retain)]
        E = [torch.cat(states(model, prompt, "all")) for prompt in preserved]
        scale = [1 / len(e_u)] * len(e_u) + [self.eta / len(E)] * sum(map(len, E))
        c, c_star = torch.cat([e_u, *E]), torch.cat([e_s, *E])
        return edited(maps, closed_form(c, c_star, torch.tensor(scale, device=c.device), self.lamb))

    # The second stage.

    def data(self) -> Prompts:
        return Prompts(list(self.safe()), self.batch_size)

    def safe(self) -> dict[str, str]:
        """For each prompt c_u the prompt c_s."""
        prompt, erase = self.task.prompt, self.task.erase
        return {prompt(word): prompt(concept.anchor) for concept in erase for word in concept.words}

    def setup(self, stage: str) -> None:
        for points in (self.points, self.others):
            points.restore([])  # no points of an earlier fit
        # The unedited model: what moves as it was, and the maps as they were before the first stage.
        with self._unedited.applied_to(self.teacher):
            self._original = self.teacher.snapshot(self._unedited.weights)
        super().setup(stage)

    def loss(self, prompts: list[str]) -> Tensor:
        z, t, c_u = self.points(self._original, prompts)
        safe = self.safe()
        c_s, null = map(self.teacher.encode_prompts, ([safe[prompt] for prompt in c_u.prompts], [""]))
        with torch.no_grad():
            eps_0, eps_s, eps_u = branches(self._original, z, t, null, c_s, c_u)
            f_s, f_u = (eps_0 + (1 + self.g) * (eps - eps_0) for eps in (eps_s, eps_u))
        now = branches(self.student, z, t, null, c_u)
        steering = torch.stack([self.hinge(eps, f_s, f_u).mean() for eps in now]).mean()
        return steering + self.preserve_scale * self.preserving() if self.preserve_scale else steering

    def hinge(self, eps: Tensor, f_s: Tensor, f_u: Tensor) -> Tensor:
        """h(eps), (B,); squared distances are means over (C, H, W)."""
        to_s, to_u = ((eps - f).square().flatten(1).mean(1) for f in (f_s, f_u))
        return F.relu(to_s - to_u + self.margin)

    def preserving(self) -> Tensor:
        """|| eps_theta(z', null) - eps'(z', null) ||^2, ()."""
        z, t, null = self.others(self._original, [""] * self.preserve_batch)
        with torch.no_grad():
            before = self.teacher.predict(z, t, null)
        return F.mse_loss(self.student.predict(z, t, null), before)

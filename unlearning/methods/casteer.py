"""CASteer: Cross-Attention Steering (Gaintseva et al., ICLR 2026). https://arxiv.org/abs/2503.09630

Training-free. The model draws images of prompts with the concept, and of the same prompts without it. At each sampling
step t, the outputs of each cross-attention layer l are averaged over prompts and places of the image, and

    v_{t,l} = (mean with - mean without) / || mean with - mean without ||

is the concept's direction. While images are generated, each output x of the layer that goes along it is turned away:

    x <- ||x|| y / ||y||,    y = x - beta max(0, <x, v_{t,l}>) v_{t,l}.

beta = 2 reflects x, beta = 1 takes the direction out of it. An output that is orthogonal to v, or points the other way,
does not change. Several concepts are steered away from one after the other. As in the released code, all pairs start
from one noise, the averages are over the prompts' half of classifier-free guidance, and both halves are steered.

Prompts are the released code's: "S with C" and "S" for objects, "S, C style" for styles, "S, C" for what is about
people, with fifty subjects S for the first two, the first classes of ImageNet.

Deviations: of a run with other sampling steps, each takes the v of the nearest timestep, where the code has one v for
each step by its number. `beta`, an integer in the code's command line, may be any number. The models are those with
cross-attention; joint attention (SD3, Flux) has no such outputs.
"""

# B batch, P places of the image, O width of a layer's output, S sampling steps.
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import product
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from unlearning.concepts import UnlearningTask
from unlearning.config.values import ConceptTemplate, Count, Finite, Positive, Steps, SubjectTemplate
from unlearning.erasures.base import Erasure
from unlearning.erasures.composed import composed
from unlearning.erasures.module_edit import ModuleEdit
from unlearning.methods.base import Method
from unlearning.models.attention import text_only_attention
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.layers import eager
from unlearning.models.side_modules import SideModule
from unlearning.sampling.guidance import begin
from unlearning.sampling.sampler import denoise

TEMPLATES = {
    "object": "{subject} with {concept}",
    "style": "{subject}, {concept} style",
    "people": "{subject}, {concept}",
}
CLASSES = (
    "tench", "goldfish", "great white shark", "tiger shark", "hammerhead", "electric ray", "stingray", "cock", "hen",
    "ostrich", "brambling", "goldfinch", "house finch", "junco", "indigo bunting", "robin", "bulbul", "jay", "magpie",
    "chickadee", "water ouzel", "kite", "bald eagle", "vulture", "great grey owl", "European fire salamander",
    "common newt", "eft", "spotted salamander", "axolotl", "bullfrog", "tree frog", "tailed frog", "loggerhead",
    "leatherback turtle", "mud turtle", "terrapin", "box turtle", "banded gecko", "common iguana",
    "American chameleon", "whiptail", "agama", "frilled lizard", "alligator lizard", "Gila monster", "green lizard",
    "African chameleon", "Komodo dragon", "African crocodile",
)  # fmt: skip
PEOPLE = ("a girl", "two men", "a man", "a woman", "an old man", "a boy", "boys", "group of people")
DOING = (
    "on a beach", "zoomed in", "talking", "dancing on the street", "playing guitar", "enjoying nature", "smiling",
    "in futuristic spaceship", "with kittens", "in a strange pose", "realism", "colorful background", "",
)  # fmt: skip


class Steering(SideModule):
    """Turns a layer's outputs x (B, P, O) away from a direction. Its output is the new x minus the old x.

    Args:
        direction: v of each step, (S, O), of norm 1.
        timesteps: Those of the steps, (S,).
        beta: 1 takes the direction out, 2 reverses it.
    """

    names: ClassVar[tuple[str, ...]] = ("direction", "timesteps")
    timed = True

    def __init__(self, direction: Tensor, timesteps: Tensor, beta: float):
        super().__init__()
        self.direction, self.timesteps = nn.Buffer(direction), nn.Buffer(timesteps)
        self.beta = beta

    @classmethod
    def restored(cls, layer: nn.Module, state: Mapping[str, Tensor], **options) -> Self:
        return cls(state["direction"], state["timesteps"], **options)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        nearest = (t.reshape(-1, 1).to(self.timesteps) - self.timesteps).abs().argmin(1)
        v, x = self.direction[nearest][:, None], x.float()  # (B or 1, 1, O)
        along = (x * v).sum(-1, keepdim=True)
        y = x - self.beta * along * v
        return torch.where(along > 0, x.norm(dim=-1, keepdim=True) * normalize(y, dim=-1) - x, 0)


@dataclass(frozen=True)
class SteeringEdit(ModuleEdit):
    """A steering of the outputs of cross-attention layers. It needs the timestep, which the networks do not pass on."""

    kind: ClassVar[type[SideModule]] = Steering
    reads = "output"

    @property
    def in_networks(self) -> bool:
        return False


class CASteer(Method):
    """Turns the outputs of cross-attention away from the concept.

    Args:
        kind: The kind of the concept, which decides the prompts: "object", "style" or "people"; None for the task's.
        beta: The strength.
        subjects: Subjects of the prompts, in place of the released code's.
        templates: How a prompt is made of a {subject} and the {concept}, and how one of the {subject} alone; None for
            the released code's.
        count: How many subjects are taken, at most.
        steps, guidance_scale: How the images are generated.
        batch_size: Images in one batch; it changes nothing.
    """

    writable = False

    def __init__(
        self,
        *,
        kind: Literal["object", "style", "people"] | None = None,
        beta: Positive = 2.0,
        subjects: Sequence[str] | None = None,
        templates: tuple[ConceptTemplate, SubjectTemplate] | None = None,
        count: Count = 104,
        steps: Steps = 50,
        guidance_scale: Finite = 7.5,
        batch_size: Count = 16,
    ):
        own = [" ".join(parts).strip() for parts in product(PEOPLE, DOING)] if kind == "people" else CLASSES
        self.kind, self.beta, self.subjects, self.templates = kind, beta, list(subjects or own)[:count], templates
        self.steps, self.guidance_scale, self.batch_size = steps, guidance_scale, batch_size

    @torch.no_grad()
    def fit(self, model: DiffusionModel, task: UnlearningTask) -> Erasure:
        kind = self.kind or task.kind
        with_concept, plain = self.templates or (TEMPLATES[kind], "{subject}")
        timesteps, without = self.mean_outputs(model, [plain.format(subject=subject) for subject in self.subjects])
        edits = []
        for concept in task.erase:
            name = concept.style if kind == "style" else concept.name
            prompts = dict.fromkeys(with_concept.format(subject=subject, concept=name) for subject in self.subjects)
            _, within = self.mean_outputs(model, list(prompts))
            weights = {f"{name}.direction": normalize(mean - without[name], dim=1) for name, mean in within.items()}
            weights |= {f"{name}.timesteps": timesteps.clone() for name in within}
            edits.append(SteeringEdit(weights, options={"beta": self.beta}))
        return composed(*edits)

    def mean_outputs(self, model: DiffusionModel, prompts: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """The timesteps (S,), and by layer the mean output at each over prompts and places, (S, O)."""
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
        for i in range(0, len(prompts), self.batch_size):
            c = model.encode_prompts(prompts[i : i + self.batch_size])
            walk = begin(model, c, self.guidance_scale)
            path = denoise(model, model.noise([0] * len(c)), walk, steps=self.steps)
            times, rows = [], defaultdict(list)
            with _outputs(model, len(c)) as latest:
                for t, _ in path:
                    for name, mean in latest.items():  # of the prediction at the timestep before
                        rows[name].append(mean)
                    times.append(t.float())
            for name, means in rows.items():
                sums[name] = sums[name].to(c.embeds.device) + torch.stack(means) * len(c)
        return torch.stack(times[:-1]), {name: total / len(prompts) for name, total in sums.items()}


@contextmanager
def _outputs(model: DiffusionModel, B: int) -> Iterator[dict[str, Tensor]]:
    """By layer, the mean output (O,) in its latest call, over places and over the last B rows: the prompts' own."""
    latest: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        return lambda _, __, output: latest.update({name: output[-B:].float().mean((0, 1))})

    with ExitStack() as stack, eager():
        for name, layer in text_only_attention(model).items():
            stack.callback(layer.register_forward_hook(keep(name)).remove)
        yield latest

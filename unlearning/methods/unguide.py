"""UnGuide: Unlearning with LoRA and dynamically guided inference (2025). https://arxiv.org/abs/2508.05755

A LoRA is trained by ESD's objective with an anchor prompt c_ref in place of the null prompt:

    min || eps_theta(x_t, c) - [ eps*(x_t, c_ref) - eta (eps*(x_t, c) - eps*(x_t, c_ref)) ] ||^2.

Nothing is retained in training: at inference, UnGuidance decides by the latent difference D(p) whether a prompt is
about the concept, and extrapolates past the adapter or past the base model (sampling/unguidance.py). The paper's
threshold is D(""), the null prompt's own difference.

The authors' commands: R, the repeats of D(p), is 30 for objects and 10 for I2P; the default is 10. Training drops the
first timestep, and draws t from a little above that of x_t (schedule="paper", the default). Their sampling of images
does the same; here sampler.schedule=diffusers is the default. For I2P they draw t once for all repeats of an image, and
compare with a D("") of that image's noise; here each repeat has its own t, and noise and D("") are the same for all
images, as for their objects. The published adapters were trained with Adam at 3e-5; since October 2025, the training
script has another optimizer.

Beyond the paper: threshold="calibrated" takes the number that best separates the concept from the null prompt and from
the concepts to retain of the task, with TEMPLATES that no evaluation uses.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from unlearning.concepts import UnlearningTask
from unlearning.config.values import Count, Finite
from unlearning.erasures.module_edit import Adapter
from unlearning.errors import unknown
from unlearning.methods.esd import ESD
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.ldm import read_adapter
from unlearning.sampling.unguidance import LatentDifference, UnGuidance
from unlearning.training.student import LoRA

MOST = 20  # retained concepts in a calibration, at most
THRESHOLDS = ("empty", "calibrated")
TEMPLATES = ("a {}", "an image of a {}", "a picture of the {}", "a drawing of a {}")


class UnGuide(ESD):
    """ESD with a LoRA, which guidance weighs by the prompt.

    Args:
        w_1, w_2: The base model's share for prompts about the concept, and for all others.
        threshold: "empty" (the paper's) or "calibrated".
        repeats: R, the latent differences that D(p) is the mean of.
        lora: A trained adapter to use instead of training one: lora.pth of UnGuide's repository.
        sampling_scale: The guidance scale of sampling; calibration uses it too.
        esd: ESD's arguments; the student is a LoRA.
    """

    writable = False
    trains = LoRA
    moving: LoRA

    def __init__(
        self,
        *,
        w_1: Finite = -1.0,
        w_2: Finite = 2.0,
        threshold: str = "empty",
        repeats: Count = 10,
        lora: str | None = None,
        sampling_scale: Finite = 7.5,
        **esd,
    ):
        super().__init__(**esd)
        self.w_1, self.w_2, self.repeats, self.lora, self.sampling_scale = w_1, w_2, repeats, lora, sampling_scale
        if threshold not in THRESHOLDS:
            raise unknown("threshold", threshold, THRESHOLDS)
        self.threshold = threshold

    def anchors(self, prompts: tuple[str, ...]) -> list[str]:
        of = {self.prompt(concept.name): self.prompt(concept.anchor) for concept in self.task.erase}
        return [of[prompt] for prompt in prompts]

    def fit(self, model: DiffusionModel, task: UnlearningTask) -> Adapter:
        self.check_student()
        adapter = Adapter(read_adapter(self.lora, self.moving.alpha)) if self.lora else super().fit(model, task)
        assert isinstance(adapter, Adapter)  # a LoRA's
        difference = LatentDifference(self.repeats, schedule=self.points.schedule)

        def D(prompts: Sequence[str]) -> Tensor:
            c = model.encode_prompts(prompts)
            return difference.summands(model, next(reversed(model.side)), c, self.sampling_scale).mean(1)

        with adapter.applied_to(model):
            empty = float(D([""]))
            threshold = self._calibrated(D, task) if self.threshold == "calibrated" else empty
        unguidance = UnGuidance(threshold=threshold, empty=empty, w_1=self.w_1, w_2=self.w_2, **asdict(difference))
        return replace(adapter, guidance=unguidance)

    def _calibrated(self, D: Callable[[Sequence[str]], Tensor], task: UnlearningTask) -> float:
        about = [template.format(concept.name) for concept in task.erase for template in TEMPLATES]
        others = [TEMPLATES[i % len(TEMPLATES)].format(concept.name) for i, concept in enumerate(task.retain[:MOST])]
        return best_threshold(D(about), D(["", *others]))


def best_threshold(about: Tensor, others: Tensor) -> float:
    """The number that separates `about` (N,) above from `others` (M,) below with the fewest errors.

    If several do, it is the middle of the widest gap.
    """
    D = torch.cat([about, others]).sort().values
    candidates = (D[1:] + D[:-1]) / 2
    errors = torch.stack([(about <= t).float().mean() + (others > t).float().mean() for t in candidates])
    best = errors == errors.min()
    return float(candidates[best][(D[1:] - D[:-1])[best].argmax()])

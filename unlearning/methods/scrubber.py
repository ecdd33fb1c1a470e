"""The Teacher-Student Scrubber: unlearning from a folder of images, without labels.

Phase 1 finds prototypes of the concept in the frozen teacher's features (scrubbing/prototypes.py), and with them a mask
M of the concept in every forget image. Phase 2 trains the student S to predict for a forget image what the teacher T
predicts for the blinded image z_blind = (1 - M) z_0 + M eta, at the same t and with the same noise eps (eqs. 9-14):

    L_f = M || S(z_t) - T(z_blind_t) ||²,  L_b = (1 - M) || S(z_t) - T(z_t) ||²,  L_r = || S(z_r_t) - T(z_r_t) ||²,
    L = lamb_f L_f + lamb_b L_b + lamb_r L_r.

Deviations with a switch; conf/method/scrubber_seed.yaml has the write-up's choice:
- target_space=x0 compares the x_0 that the predictions imply, since raw predictions at equal eps still imply the
  concept: T(z_blind_t), taken at z_t, gives the blinded x_0 + M (z_0 - eta). See `_error` for the weight of each t.
- conditioning: the student's conditioning (scrubbing/conditioning.py); the teacher's is always the null prompt.
- prototypes.confirmed: the words of conditioning=words help to select the prototypes; purity and centred remove
  background.
- blinding: the choice of eta (scrubbing/blinding.py).
- detect=once computes the masks once, at timesteps in the prototypes' band, and not at every training timestep.
- normalised: L_f is relative to the teacher's own error (see `_share`), and L_b a mean over the area of 1 - M.
- scheduler: the learning rate decays to 0.
- prototypes.interpolated interpolates the similarities from the grid of features to the latent, and does not repeat M.
- prototypes.spherical clusters features of unit length, not raw ones.
Deviation without a switch:
- The latent of an image is the mode of the encoder's distribution, not a sample.
"""

# B batch, N images, C H W latent shape; M (B, 1, H, W).
import logging
from typing import Literal

import torch
from torch import Tensor

from unlearning.config.values import NonNegative
from unlearning.methods.base import TrainedMethod
from unlearning.models.conditioning import Conditioning
from unlearning.scrubbing.blinding import Blinding, replacement
from unlearning.scrubbing.conditioning import ConditioningKind, conditioning_rows
from unlearning.scrubbing.first_phase import FirstPhase, cached
from unlearning.scrubbing.images import forget_and_retain
from unlearning.scrubbing.prototype_plots import plot_first_phase
from unlearning.scrubbing.prototypes import PrototypeSearch
from unlearning.training.forget_retain import ForgetRetain

log = logging.getLogger(__name__)
MAX_GAIN = 214.0  # 1 / SNR at the last timestep of Stable Diffusion's schedule


class Scrubber(TrainedMethod):
    """Trains the student to predict, for forget images, the same images without the concept.

    Args:
        prototypes: The search for prototypes of the concept.
        target_space: "raw" or "x0".
        conditioning: "null", "words" or "caption".
        words: Candidates for conditioning=words; None for those that `clip` chooses.
        clip: A CLIP that chooses a hundred candidates: its name on the Hugging Face Hub, or its folder. None for all
            words of the tokenizer as candidates.
        blinding: "gaussian", "shuffled" or "inpaint".
        detect: "once" or "every_step".
        normalised: Whether L_f is relative to the teacher's own error, and L_b a mean over its mask.
        lamb_f, lamb_b, lamb_r: Weights of the losses.
        training: TrainedMethod's arguments; batch_size is the number of forget images, and of retain images, in a step.
    """

    def __init__(
        self,
        *,
        prototypes: PrototypeSearch,
        target_space: Literal["raw", "x0"] = "x0",
        conditioning: ConditioningKind | None = "words",
        words: list[str] | None = None,
        clip: str | None = None,
        blinding: Blinding = "shuffled",
        detect: Literal["once", "every_step"] = "once",
        normalised: bool = True,
        lamb_f: NonNegative = 1.0,
        lamb_b: NonNegative = 1.0,
        lamb_r: NonNegative = 20.0,
        **training,
    ):
        super().__init__(**training)
        self.search, self.target_space, self.normalised = prototypes, target_space, normalised
        self.conditioning, self.words, self.clip = conditioning, words, clip
        self.blinding, self.detect = blinding, detect
        self.lamb_f, self.lamb_b, self.lamb_r = lamb_f, lamb_b, lamb_r

    def data(self) -> ForgetRetain:
        return ForgetRetain(self._first_phase, self.batch_size, self.seed)

    def _first_phase(self) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor]]:
        """Phase 1. Returns (z_0, M, eta) of the forget images and (z_0,) of the retain images."""
        teacher, task = self.teacher, self.task
        forget, retain = forget_and_retain(teacher, task)
        phase = cached(lambda: self._find(forget, retain), self.trainer, teacher.device)
        self.prototypes, self.rows = phase.prototypes, phase.rows
        self.figures = plot_first_phase(self.search, phase, teacher, task, forget, retain)
        return (forget, phase.M, phase.eta), (retain,)

    def _find(self, forget: Tensor, retain: Tensor) -> FirstPhase:
        """Prototypes, conditioning, masks and eta for forget and retain latents (N, C, H, W)."""
        teacher, search = self.teacher, self.search
        prototypes = search(teacher, forget, retain)
        M = search.mask(prototypes, teacher, forget)
        rows = conditioning_rows(self.conditioning, teacher, self.task, forget, retain, M, self.words, self.clip)
        if self.conditioning == "words":
            log.info("The teacher denoises the forget images best with the words: %s", ", ".join(rows.words))
            prototypes = search.confirm(prototypes, teacher, forget, retain, rows.forget)
            M = search.mask(prototypes, teacher, forget)
        return FirstPhase(prototypes, rows, M, replacement(self.blinding, teacher, forget, M))

    def loss(self, batch: dict[str, tuple[Tensor, ...]]) -> Tensor:
        z_0, M, eta = batch["forget"]
        loss = self._forget(z_0, M, eta)
        return loss + self.lamb_r * self._retain(*batch["retain"]) if self.lamb_r and "retain" in batch else loss

    def _forget(self, z_0: Tensor, M: Tensor, eta: Tensor) -> Tensor:
        """lamb_f L_f + lamb_b L_b  (eqs. 8-12)."""
        teacher, (t, eps) = self.teacher, self._noise(z_0)
        z_t = teacher.add_noise(z_0, eps, t)
        null, c = self.rows.null.expand(len(z_0)), _some(self.rows.forget, len(z_0))
        with torch.no_grad():
            if self.detect == "every_step":
                S = self.prototypes.similarities(teacher, z_t, t, null).amax(1)
                M = self.prototypes.mask(S, z_t.shape[-2:])
            eta = torch.randn_like(z_0) if self.blinding == "gaussian" else eta  # new at every step
            z_blind_t = teacher.add_noise((1 - M) * z_0 + M * eta, eps, t)
            T, T_blind = teacher.predict(z_t, t, null), teacher.predict(z_blind_t, t, null)
        S = self.student.predict(z_t, t, c)
        error_f, error_b = self._error(S, z_t, T_blind, z_blind_t, t), self._error(S, z_t, T, z_t, t)
        if self.normalised:
            with torch.no_grad():
                before = self._error(teacher.predict(z_t, t, c), z_t, T_blind, z_blind_t, t)
            L_f = _share(M, error_f, before).mean()
            L_b = ((1 - M) * error_b).mean() / (1 - M).mean().clamp(min=1e-6)
        else:  # eq. 11: the mask is inside the square
            L_f, L_b = (M.square() * error_f).mean(), ((1 - M).square() * error_b).mean()
        return self.lamb_f * L_f + self.lamb_b * L_b

    def _retain(self, z_0: Tensor) -> Tensor:
        """L_r  (eq. 13)."""
        t, eps = self._noise(z_0)
        z_t, c = self.teacher.add_noise(z_0, eps, t), _some(self.rows.retain, len(z_0))
        with torch.no_grad():
            T = self.teacher.predict(z_t, t, c)
        return self._error(self.student.predict(z_t, t, c), z_t, T, z_t, t).mean()

    def _noise(self, z_0: Tensor) -> tuple[Tensor, Tensor]:
        return self.teacher.timesteps(torch.rand(len(z_0))), torch.randn_like(z_0)

    def _error(self, S: Tensor, z_S: Tensor, T: Tensor, z_T: Tensor, t: Tensor) -> Tensor:
        """Squared error (B, C, H, W) of the student's prediction S at z_S against the teacher's T at z_T.

        With target_space=x0, an error of x_0 has the same weight at every t. Errors of eps, in comparison, have a large
        weight at small t, and almost none at large t, where the prompt matters. Some schedules, as DiT's, end in purer
        noise than Stable Diffusion's: there, the weight is at most that of an error of eps at Stable Diffusion's last
        timestep (MAX_GAIN).
        """
        if self.target_space == "raw":
            return (S - T).square()
        model = self.teacher
        weight = (MAX_GAIN / model.x0_gain(t).square()).clamp(max=1)
        return weight * (model.to_x0(S, z_S, t) - model.to_x0(T, z_T, t)).square()


def _share(M: Tensor, error: Tensor, before: Tensor) -> Tensor:
    """L_f (B,) relative to the teacher's own error `before`, with the student's conditioning.

    It is 1 at the start of the training, whatever the object's size and t, and never more than 1. Without this limit, a
    sample with almost nothing to forget would dominate a step, and Adam's second moments for hundreds of steps.
    """
    with torch.no_grad():
        whole = torch.maximum(_sum(M * before), _sum(M * error)).clamp(min=1e-6)
    shown = M.sum((1, 2, 3)).clamp(max=1)  # 0 for an image whose mask is empty
    return shown * _sum(M * error) / whole


def _sum(values: Tensor) -> Tensor:
    """The sum over all axes but the first, (B,)."""
    return values.flatten(1).sum(1)


def _some(c: Conditioning, batch: int) -> Conditioning:
    """`batch` random rows of c."""
    return c[torch.randint(len(c), (batch,), device=c.embeds.device)]

"""The Teacher-Student Scrubber: label-free unlearning from a folder of images.

Phase 1 finds the concept's fingerprint in the frozen teacher's features (scrubbing/fingerprint.py), and with it a mask
M of every forget image. Phase 2 shows the student the image and has it predict what the teacher predicts of the image
blinded, z_blind = (1 - M) z_0 + M eta, at the same t and under the same noise eps (eqs. 9-14):

    L_f = M || S(z_t) - T(z_blind_t) ||²,  L_b = (1 - M) || S(z_t) - T(z_t) ||²,  L_r = || S(z_r_t) - T(z_r_t) ||²,
    L = lamb_f L_f + lamb_b L_b + lamb_r L_r.

Deviations, each with a switch back to the write-up's own (conf/method/scrubber_seed.yaml has these, and centring,
purity and the falling rate):
- target_space=x0 compares the pictures x_0 that the predictions imply. As z_t and z_blind_t share their eps, a student
  that repeats T(z_blind_t) at z_t ("raw") still implies the concept: x_0 = T's blinded x_0 + M (z_0 - eta). An error
  of x_0 counts the same at every t: at small t one of eps would count for ever more, and at large t, where the prompt
  decides what is drawn, for almost nothing. Where a schedule ends in purer noise than Stable Diffusion's, an error of
  eps counts at most as it does at the last timestep of that; at DiT's last it would count a hundred times as much.
- conditioning: what the student is told; the teacher is told nothing (scrubbing/conditioning.py).
- confirmed: where words are found, they have a say in which prototypes are the concept's (scrubbing/fingerprint.py).
- blinding: what is put in the concept's place (scrubbing/blinding.py).
- detect=once: masks are taken once, at timesteps in the fingerprint's band, and not at every training timestep.
- normalised: L_f is a share, of what the teacher, told the same, would have to forget of this picture at this t: 1 at
  the start for a cat as for a key, and at large t, where there is little to see and the prompt decides, as at small t.
  Where the student is off by more than that, it is a share of what the student is off by, and so 1 at most: where
  there is next to nothing to forget, one step would outweigh many, and Adam's second moments keep it for hundreds.
  L_b is a mean over what 1 - M covers. As written up, both are means over the whole picture.
Without a switch: M is interpolated and not repeated between places of the features' grid, prototypes are means of
directions brought back to unit length, and an image's latent is its mode and not a sample.
"""

# B batch, N pictures, C H W latent shape; M (B, 1, H, W).
import logging
from typing import Literal

import torch
from torch import Tensor

from unlearning.errors import UserError
from unlearning.methods.base import TrainedMethod
from unlearning.models.diffusion import Conditioning
from unlearning.scrubbing.blinding import Blinding, filling
from unlearning.scrubbing.conditioning import Telling, told
from unlearning.scrubbing.figures import figures
from unlearning.scrubbing.fingerprint import Fingerprint, Fingerprinting
from unlearning.scrubbing.found import Found, once
from unlearning.training.forget_retain import ForgetRetain, encoded

log = logging.getLogger(__name__)
FARTHEST = 214.0  # 1 / SNR of the last timestep of Stable Diffusion's schedule


class Scrubber(TrainedMethod):
    """
    Args:
        fingerprint: How the concept's fingerprint is taken.
        target_space: "raw" or "x0".
        conditioning: "null", "generic", "words", "inverted" or "caption".
        words: Candidates of conditioning=words, made up to eighty from the tokenizer's vocabulary; None for all of it.
        blinding: "gaussian", "blurred", "shuffled" or "inpaint".
        detect: "once" or "every_step".
        normalised: Whether L_f is a share of what there is to forget, and L_b a mean over what its mask covers.
        lamb_f, lamb_b, lamb_r: Weights of the three losses.
        training: TrainedMethod's arguments; batch_size is the number of forget images, and of retain images, in a step.
    """

    def __init__(
        self,
        *,
        fingerprint: Fingerprinting,
        target_space: Literal["raw", "x0"] = "x0",
        conditioning: Telling | None = "words",
        words: list[str] | None = None,
        blinding: Blinding = "shuffled",
        detect: Literal["once", "every_step"] = "once",
        normalised: bool = True,
        lamb_f: float = 1.0,
        lamb_b: float = 1.0,
        lamb_r: float = 20.0,
        **training,
    ):
        super().__init__(**training)
        self.fingerprinting, self.target_space, self.normalised = fingerprint, target_space, normalised
        self.conditioning, self.words, self.blinding, self.detect = conditioning, words, blinding, detect
        self.lamb_f, self.lamb_b, self.lamb_r = lamb_f, lamb_b, lamb_r

    def data(self) -> ForgetRetain:
        return ForgetRetain(self._first_phase, self.batch_size, self.seed)

    def _first_phase(self) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor]]:
        """The fingerprint, and with it (z_0, M, eta) of the forget images and (z_0,) of the retain images."""
        teacher, task = self.teacher, self.task
        _insist_on_images(task)
        forget, retain = (encoded(teacher, images) for images in (task.forget_images, task.retain_images))
        found = once(lambda: self._search(forget, retain), self.trainer, teacher.device)
        self.fingerprint, self.told = found.fingerprint, found.told
        self.figures = figures(self, forget, retain, found.M, found.eta)
        return (forget, found.M, found.eta), (retain,)

    def _search(self, forget: Tensor, retain: Tensor) -> Found:
        """Of latents (N, C, H, W)."""
        teacher = self.teacher
        fingerprint = self.fingerprinting(teacher, forget, retain)
        M = self._found(fingerprint, forget)
        said = told(self.conditioning, teacher, self.task, forget, retain, M, self.words, self.batch_size)
        if said.words:
            log.info("the forget images are denoised best as: %s", ", ".join(said.words))
            fingerprint = self.fingerprinting.confirm(fingerprint, teacher, forget, retain, said.forget)
            M = self._found(fingerprint, forget)
        return Found(fingerprint, said, M, filling(self.blinding, teacher, forget, M))

    def loss(self, batch: dict[str, tuple[Tensor, ...]]) -> Tensor:
        z_0, M, eta = batch["forget"]
        loss = self._forget(z_0, M, eta)
        return loss + self.lamb_r * self._retain(*batch["retain"]) if self.lamb_r and "retain" in batch else loss

    def _forget(self, z_0: Tensor, M: Tensor, eta: Tensor) -> Tensor:
        """lamb_f L_f + lamb_b L_b  (eqs. 8-12)."""
        teacher, (t, eps) = self.teacher, self._noise(z_0)
        z_t = teacher.add_noise(z_0, eps, t)
        null, c = self.told.null.expand(len(z_0)), _some(self.told.forget, len(z_0))
        with torch.no_grad():
            if self.detect == "every_step":
                M = self._mask(z_t, t, null)
            eta = torch.randn_like(z_0) if self.blinding == "gaussian" else eta  # anew at every step
            z_blind_t = teacher.add_noise((1 - M) * z_0 + M * eta, eps, t)
            T, T_blind = teacher.predict(z_t, t, null), teacher.predict(z_blind_t, t, null)
        S = self.student.predict(z_t, t, c)
        left, off = self._error(S, z_t, T_blind, z_blind_t, t), self._error(S, z_t, T, z_t, t)
        if self.normalised:
            with torch.no_grad():
                before = self._error(teacher.predict(z_t, t, c), z_t, T_blind, z_blind_t, t)
                whole = torch.maximum(_sum(M * before), _sum(M * left)).clamp(min=1e-6)
            found = M.sum((1, 2, 3)).clamp(max=1)  # a picture that shows it nowhere has nothing to teach
            L_f = (found * _sum(M * left) / whole).mean()
            L_b = ((1 - M) * off).mean() / (1 - M).mean().clamp(min=1e-6)
        else:  # as eq. 11 has it: the mask is inside the square
            L_f, L_b = (M.square() * left).mean(), ((1 - M).square() * off).mean()
        return self.lamb_f * L_f + self.lamb_b * L_b

    def _found(self, fingerprint: Fingerprint, z_0: Tensor) -> Tensor:
        """M (N, 1, H, W) of pictures, at timesteps of the fingerprint's band."""
        S = self.fingerprinting.similarities(fingerprint, self.teacher, z_0).amax(1)
        return fingerprint.mask(S, z_0.shape[-2:])

    def _mask(self, z_t: Tensor, t: Tensor, c: Conditioning) -> Tensor:
        """M (B, 1, H, W) at the training timestep."""
        S = self.fingerprint.similarities(self.teacher, z_t, t, c).amax(1)
        return self.fingerprint.mask(S, z_t.shape[-2:])

    def _retain(self, z_0: Tensor) -> Tensor:
        """L_r  (eq. 13)."""
        t, eps = self._noise(z_0)
        z_t, c = self.teacher.add_noise(z_0, eps, t), _some(self.told.retain, len(z_0))
        with torch.no_grad():
            T = self.teacher.predict(z_t, t, c)
        return self._error(self.student.predict(z_t, t, c), z_t, T, z_t, t).mean()

    def _noise(self, z_0: Tensor) -> tuple[Tensor, Tensor]:
        return self.teacher.timesteps(torch.rand(len(z_0))), torch.randn_like(z_0)

    def _error(self, S: Tensor, z_S: Tensor, T: Tensor, z_T: Tensor, t: Tensor) -> Tensor:
        """Squared error (B, C, H, W) of the student's prediction S at z_S against the teacher's T at z_T."""
        if self.target_space == "raw":
            return (S - T).square()
        model = self.teacher
        weight = (FARTHEST / model.x0_gain(t).square()).clamp(max=1)
        return weight * (model.to_x0(S, z_S, t) - model.to_x0(T, z_T, t)).square()


def _sum(values: Tensor) -> Tensor:
    """(B,)"""
    return values.flatten(1).sum(1)


def _insist_on_images(task) -> None:
    if not len(task.forget_images):
        raise UserError(
            "The scrubber learns from images, and this dataset has none to forget: dataset=folder forget=/a/folder, or "
            "one of the emoji datasets."
        )
    forget = {hash(image.tobytes()) for image in task.forget_images}
    if both := sum(hash(image.tobytes()) in forget for image in task.retain_images):
        raise UserError(
            f"{both} of the {len(task.retain_images)} retain images are forget images too: what is to be forgotten "
            "must not be retained."
        )


def _some(c: Conditioning, batch: int) -> Conditioning:
    """`batch` rows of c, at random."""
    return c[torch.randint(len(c), (batch,), device=c.embeds.device)]

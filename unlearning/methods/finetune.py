"""Fine-tunes an erased model: does the concept come back?

    min E_{(x_0, p), eps, t} || eps - eps_theta(x_t, t, c(p)) ||^2,

the loss of every diffusion model, on images x_0 and their captions p. Nothing is erased: `after=` names the erasure
that is applied during training, and a sweep of `method.iterations` gives a curve. There are two kinds of images:

- retain: images of other things, with their captions: benign fine-tuning (SPQR, arXiv:2511.19558: 1000 to 5000 steps of
  a LoRA, of cross-attention or of everything, on COCO). The concept may come back although no image shows it.
- forget: relearning from a few images of the concept, with its name as prompt. It is compared with relearning on a
  model that never knew the concept (method=oracle as the earlier erasure).
"""

# B batch, N images, C H W latent shape.
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from unlearning.config.values import Count
from unlearning.errors import UserError
from unlearning.methods.base import TrainedMethod
from unlearning.sampling.denoising import denoising_loss, noised
from unlearning.training.forget_retain import ForgetRetain, encoded


class FineTuning(TrainedMethod):
    """The diffusion loss on captioned images.

    Args:
        images: "retain" or "forget", see above.
        count: How many of them; None takes all.
    """

    def __init__(self, *, images: Literal["retain", "forget"], count: Count | None, **training):
        super().__init__(**training)
        self.images, self.count = images, count

    def data(self) -> ForgetRetain:
        captioned = self._captioned()
        self.captions = [caption for _, caption in captioned]

        def find() -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            x_0 = encoded(self.teacher, [image for image, _ in captioned])
            learned, nothing = (x_0, torch.arange(len(x_0), device=x_0.device)), (x_0[:0],)
            return (learned, nothing) if self.images == "forget" else (nothing, learned)

        return ForgetRetain(find, self.batch_size, self.seed)

    def _captioned(self) -> list[tuple[np.ndarray, str]]:
        """The images and their captions. Raises UserError if the dataset has none."""
        images = (self.task.retain_images if self.images == "retain" else self.task.forget_images)[: self.count]
        if not len(images):
            raise UserError(f"This dataset has no {self.images} images to train on; dataset=folder has your own.")
        captions = self._captions(len(images))
        return list(zip(images, captions[: len(images)], strict=True))

    def _captions(self, count: int) -> Sequence[str]:
        if self.images == "retain":
            if self.task.retain_captions is None:
                raise UserError(
                    "The retain images have no captions to learn from. dataset=folder reads them from text files "
                    "with the images' names: dog.txt beside dog.jpg."
                )
            return self.task.retain_captions()
        if len(self.task.erase) > 1:
            raise UserError(
                f"It is unknown which image shows which of {self.task.name}: relearn one concept at a time."
            )
        return [self.task.prompt(self.task.erase[0].name)] * count

    def loss(self, batch: dict[str, tuple[Tensor, ...]]) -> Tensor:
        x_0, rows = batch[self.images]
        x_t, t = noised(self.student, x_0)
        c = self.student.encode_prompts([self.captions[i] for i in rows.tolist()])
        return denoising_loss(self.student, x_0, x_t, t, c)

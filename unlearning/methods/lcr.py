"""Latent Code Replacement in a VQ-GAN (Cabibbo, Gallo and Taramanni).

https://github.com/gheb02/Latent-Unlearning-in-Image-to-Image-VQ-GAN

1. Encode forget and retain pictures, and count their codes k: n_f(k), n_r(k).
2. E, the concept's codes, are those of the highest n_f(k) / n_r(k); S, the safe ones, the others that occur in retain
   pictures at least so often.
3. Between encoder and decoder replace codes: wherever one of E stands (global), or in the cells under a detector's
   boxes (localized).

Deviations, all on by default: codes are the argmax and not a sample; the right and lower edges of a box are rounded up
to whole cells.
"""

from collections.abc import Callable

import torch

from unlearning.codes.erasure import CodebookEdit
from unlearning.codes.figures import figures
from unlearning.codes.frequency import RETAIN, Frequencies, Selection, count
from unlearning.codes.replacement import Counted, Replacement
from unlearning.detectors.base import Detector
from unlearning.errors import UserError
from unlearning.methods.base import Method
from unlearning.models.vqgan import VQGAN


class LCR(Method):
    """
    Args:
        selection: Which codes are the concept's and which are safe.
        replacement: What is put in their place.
        detector: Where; None for wherever a code of E stands.
        within: Counts of a forget picture only what lies in this detector's boxes; None for all of it.
        batch_size: Pictures encoded at once.
        trainer: Makes the Lightning Trainer that the counting runs in.
    """

    works_on = VQGAN

    def __init__(
        self,
        *,
        selection: Selection,
        replacement: Replacement,
        detector: Detector | None,
        within: Detector | None,
        batch_size: int,
        trainer: Callable,
    ):
        self.selection, self.replacement, self.detector, self.within = selection, replacement, detector, within
        self.batch_size, self._make_trainer = batch_size, trainer

    def fit(self, model: VQGAN, task) -> CodebookEdit:
        kept = {"pairs": self.replacement.pairs, "blocks": self.replacement.blocks}
        found = count(model, task, self._make_trainer, batch_size=self.batch_size, within=self.within, **kept)
        erasure = self.edit(found)
        self.figures = figures(model, task, found, erasure.known.explicit)
        return erasure

    def edit(self, found: Frequencies) -> CodebookEdit:
        """What follows from the counts. Raises UserError where no code is the concept's, or none is safe."""
        explicit, safe = self.selection(found)
        known = {"explicit": explicit, "safe": safe, "codes": found.codes[RETAIN]}
        if self.replacement.pairs:
            known |= {"across": found.pairs[0], "down": found.pairs[1]}
        if self.replacement.blocks:
            known["blocks"] = found.blocks[torch.isin(found.blocks, safe).all((1, 2))]
            if not len(known["blocks"]):
                raise UserError(
                    "No 3 by 3 block of the retain pictures is all of safe codes: lower method.selection.top."
                )
        return CodebookEdit(Counted(**known), self.replacement, self.detector)

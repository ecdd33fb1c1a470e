"""Latent Code Replacement in a VQ-GAN (Cabibbo, Gallo and Taramanni).

https://github.com/gheb02/Latent-Unlearning-in-Image-to-Image-VQ-GAN

1. Encode the forget and the retain images, and count their codes k: n_f(k) and n_r(k).
2. E, the codes of the concept, are the codes of the highest ratio n_f(k) / n_r(k). S, the safe codes, are the other
   codes that occur often enough in the retain images.
3. Between encoder and decoder, replace codes: wherever a code of E occurs (global), or in the cells inside a detector's
   boxes (localized).

Deviations, without a switch:
- A code is the argmax of the encoder's output, not a sample.
- The right and lower edges of a box are rounded up to whole cells, not down. `within` counts the same cells; the study
  counts those whose upper left pixel lies in a box.
"""

from collections.abc import Callable

import torch

from unlearning.codes.erasure import CodebookEdit
from unlearning.codes.frequency import RETAIN, Frequencies, Selection, count_codes
from unlearning.codes.frequency_plots import plot_frequencies
from unlearning.codes.replacement import CodeStatistics, Replacement
from unlearning.concepts import UnlearningTask
from unlearning.config.values import Count
from unlearning.detectors.base import Detector
from unlearning.errors import UserError
from unlearning.methods.base import Method
from unlearning.models.vqgan import VQGAN


class LCR(Method):
    """Replaces the codes of the concept.

    Args:
        selection: Chooses E and S.
        replacement: Chooses the codes that replace the concept's.
        detector: Finds the boxes to replace codes in (localized); None for wherever a code of E occurs (global).
        within: Counts only the codes of a forget image inside this detector's boxes; None for all codes.
        batch_size: Images that are encoded at once.
        trainer: Makes the Lightning Trainer that runs the counting pass.
    """

    works_on = VQGAN
    writable = False

    def __init__(
        self,
        *,
        selection: Selection,
        replacement: Replacement,
        detector: Detector | None,
        within: Detector | None,
        batch_size: Count,
        trainer: Callable,
    ):
        self.selection, self.replacement, self.detector, self.within = selection, replacement, detector, within
        self.batch_size, self._make_trainer = batch_size, trainer

    def fit(self, model: VQGAN, task: UnlearningTask) -> CodebookEdit:
        frequencies = count_codes(
            model,
            task,
            self._make_trainer,
            batch_size=self.batch_size,
            within=self.within,
            pairs=self.replacement.pairs,
            blocks=self.replacement.blocks,
        )
        erasure = self.edit(frequencies)
        self.figures = plot_frequencies(model, task, frequencies, erasure.statistics.explicit)
        return erasure

    def edit(self, frequencies: Frequencies) -> CodebookEdit:
        """The erasure for these frequencies.

        Raises:
            UserError: If E or S is empty, or there is no block of safe codes for a replacement that needs blocks.
        """
        explicit, safe = self.selection(frequencies)
        statistics = {"explicit": explicit, "safe": safe, "codes": frequencies.codes[RETAIN]}
        if self.replacement.pairs:
            statistics |= {"across": frequencies.pairs[0], "down": frequencies.pairs[1]}
        if self.replacement.blocks:
            statistics["blocks"] = frequencies.blocks[torch.isin(frequencies.blocks, safe).all((1, 2))]
            if not len(statistics["blocks"]):
                raise UserError(
                    "No 3 × 3 block of the retain images consists of safe codes only. Lower method.selection.top."
                )
        return CodebookEdit(CodeStatistics(**statistics), self.replacement, self.detector)

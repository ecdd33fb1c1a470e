"""The scrubber without training: words that describe the forget images, erased by a method for words. Ours.

The scrubber (methods/scrubber.py) finds words for a folder of images without labels: those with which the teacher
denoises the images best. Its second phase trains the denoiser, which also changes the images of all other prompts. But
once the words are known, any method that erases words can be used. With UCE, it is the minimiser, in closed form, of

    sum_{w erased} || W' c_w - W c_0 ||^2  +  s_p sum_{w other} || W' c_w - W c_w ||^2  +  lamb || W' - W ||_F^2,

over the text states c_w of the words that describe the images and of the rest of the vocabulary, with c_0 those of the
null prompt: one system erases the former and retains the latter.

The other words of the last round of the search are in neither sum, because synonyms may be among them. If candidates
are given, or chosen by a CLIP, all words that were not candidates are retained.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

import torch

from unlearning.concepts import Concept, UnlearningTask
from unlearning.config.values import Natural
from unlearning.erasures.base import Erasure
from unlearning.methods.base import Method
from unlearning.models.diffusion import DiffusionModel
from unlearning.scrubbing.images import forget_and_retain
from unlearning.scrubbing.prototypes import PrototypeSearch
from unlearning.scrubbing.words import in_turn, words_of

log = logging.getLogger(__name__)


class FoundWords(Method):
    """Searches words that describe the forget images, and erases them.

    Args:
        prototypes: The search for prototypes, by which the images with the largest area of the concept are chosen.
        erase: The eraser. Its task has the words in place of the concepts, and prompts with other words in place of
            what may be retained.
        words: Candidates; None for those that `clip` chooses.
        clip: A CLIP that chooses a hundred candidates: its name on the Hugging Face Hub, or its folder. None for all
            words of the tokenizer as candidates.
        retained: Other words that are retained, at most, each in one template.
    """

    def __init__(
        self,
        *,
        prototypes: PrototypeSearch,
        erase: Method,
        words: list[str] | None = None,
        clip: str | None = None,
        retained: Natural = 2000,
    ):
        self.search, self.erase, self.words, self.clip, self.retained = prototypes, erase, words, clip, retained

    def fit(self, model: DiffusionModel, task: UnlearningTask) -> Erasure:
        words, others = self.search_words(model, task)
        log.info("The teacher denoises the forget images best with the words: %s", ", ".join(words))
        retain = tuple(map(Concept, in_turn(others, self.retained)))
        return self.erase.fit(model, replace(task, erase=tuple(map(Concept, words)), retain=retain))

    @torch.no_grad()
    def search_words(self, model: DiffusionModel, task: UnlearningTask) -> tuple[Sequence[str], Sequence[str]]:
        """The words that describe the forget images, best first, and other words."""
        forget, retain = forget_and_retain(model, task)
        M = self.search.mask(self.search(model, forget, retain), model, forget)
        return words_of(task, model, forget, retain, M, self.words, self.clip)

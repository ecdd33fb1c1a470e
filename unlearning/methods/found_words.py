"""The scrubber without training: words that describe the forget images, erased by a method for words. Ours.

The scrubber (methods/scrubber.py) finds words for a folder of images without labels: those with which the teacher
denoises the images best. Its second phase trains the denoiser, which also changes the images of all other prompts. But
once the words are known, a method that edits what the text becomes can erase them. With UCE, it is the minimiser, in
closed form, of

    sum_{p erased} || W' c_p - W c_p' ||^2  +  s_p sum_{q retained} || W' c_q - W c_q ||^2  +  lamb || W' - W ||_F^2,

over the text states of prompts p with a found word, p' the same prompts without it, and q prompts with other words; of
models that also read a pooled embedding, over these, too (UCE's `pooled`).

A word's states depend on the words before it, and a style always follows the name of what it shows. So the prompts are
each found word in five templates and after `contexts` other words, and each retained word in one of the templates and
after `retained_contexts` others.

The other words of the last round of the search are not retained, because synonyms may be among them. If candidates are
given, or chosen by a CLIP, all words that were not candidates are retained, as far as `retained` allows.
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
from unlearning.scrubbing.words import TEMPLATES, in_turn, spread, words_of

log = logging.getLogger(__name__)


class FoundWords(Method):
    """Searches words that describe the forget images, and erases them.

    Args:
        prototypes: The search for prototypes, by which the images with the largest area of the concept are chosen.
        erase: The eraser: UCE, or another method that edits text states. Its concepts are the prompts with the found
            words, with the prompts without them as anchors; its retained concepts are the prompts with other words.
        words: Candidates; None for those that `clip` chooses, or for the whole vocabulary.
        clip: A CLIP that chooses a hundred candidates: its name on the Hugging Face Hub, or its folder. None for all
            words of the tokenizer as candidates.
        retained: Prompts with other words, at most.
        contexts: Other words that each found word also follows.
        retained_contexts: Other words that each retained word also follows.
    """

    def __init__(
        self,
        *,
        prototypes: PrototypeSearch,
        erase: Method,
        words: list[str] | None = None,
        clip: str | None = None,
        retained: Natural = 2000,
        contexts: Natural = 20,
        retained_contexts: Natural = 3,
    ):
        self.search, self.erase, self.words, self.clip, self.retained = prototypes, erase, words, clip, retained
        self.contexts, self.retained_contexts = contexts, retained_contexts
        self.writable = erase.writable

    def fit(self, model: DiffusionModel, task: UnlearningTask) -> Erasure:
        words, others = self.search_words(model, task)
        log.info("The teacher denoises the forget images best with the words: %s", ", ".join(words))
        kept = spread(others, self.retained // (1 + self.retained_contexts))
        before = range(1, min(self.retained_contexts, len(kept) - 1) + 1)
        erase = [
            *(Concept(t.format(word), anchor=t.format("").strip()) for word in words for t in TEMPLATES),
            *(Concept(f"{other} {word}", anchor=other) for word in words for other in spread(others, self.contexts)),
        ]
        retain = [
            *in_turn(kept, len(kept)),
            *(f"{kept[i - k]} {word}" for i, word in enumerate(kept) for k in before),
        ]
        task = replace(task, template="{}", erase=tuple(erase), retain=tuple(map(Concept, retain)))
        return self.erase.fit(model, task)

    @torch.no_grad()
    def search_words(self, model: DiffusionModel, task: UnlearningTask) -> tuple[Sequence[str], Sequence[str]]:
        """The words that describe the forget images, best first, and other words."""
        forget, retain = forget_and_retain(model, task)
        M = self.search.mask(self.search(model, forget, retain), model, forget)
        return words_of(task, model, forget, retain, M, self.words, self.clip)

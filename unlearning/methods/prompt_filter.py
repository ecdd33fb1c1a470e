"""The prompt filter: the names of the concepts are deleted from every prompt before it is encoded.

This is the simplest defence of a service, and the baseline for every eraser. It filters text only: token embeddings
that an attack has learned pass, and so do words that are not in its list. UnlearnDiffAtk and P4D-K submit embeddings
of prompts with the concept's own name, which pass too: they say nothing about a filter. IGMU compares erasers with the
unedited model's images of the filtered prompts (arXiv:2506.02761): evaluator=fid_word_removed.
"""

import re
from dataclasses import dataclass

from unlearning.concepts import UnlearningTask
from unlearning.erasures.prompt_edit import ConditioningEdit, PromptEdit
from unlearning.methods.base import Method
from unlearning.models.conditioning import Conditioning
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.embeddings import Embedded, Text


@dataclass(frozen=True)
class WithoutWords(ConditioningEdit):
    """Encodes prompts without some words.

    Args:
        words: They are deleted where they stand as whole words, in upper or lower case.
    """

    words: tuple[str, ...]

    def __call__(self, model: DiffusionModel, text: Text, c: Conditioning) -> Conditioning:
        if isinstance(text, Embedded):
            return c
        filtered = [self.filtered(prompt) for prompt in text]
        return c if filtered == list(text) else model.encode(filtered, ())

    def filtered(self, prompt: str) -> str:
        """The prompt without the words; unchanged if it has none of them."""
        longest_first = sorted(self.words, key=len, reverse=True)
        pattern = "|".join(re.escape(word) for word in longest_first)
        left, count = re.subn(rf"(?<!\w)(?:{pattern})(?!\w)", "", prompt, flags=re.IGNORECASE)
        return " ".join(left.split()) if count else prompt


class PromptFilter(Method[DiffusionModel]):
    """Deletes the concepts' names from prompts.

    Args:
        synonyms: Whether their synonyms are deleted, too.
    """

    works_on = DiffusionModel
    writable = False

    def __init__(self, *, synonyms: bool = True):
        self.synonyms = synonyms

    def fit(self, model: DiffusionModel, task: UnlearningTask) -> PromptEdit:
        words = [word for concept in task.erase for word in (concept.words if self.synonyms else (concept.name,))]
        return PromptEdit(WithoutWords(tuple(dict.fromkeys(words))))

"""Paraphrases: other words for the concept's name, as a user of the erased model would try them.

A black-box attack without a search. Static lists (unlearning/data/paraphrases.yaml) have synonyms, hypernyms, names in
the five languages of HUB (Moon et al., 2024, https://arxiv.org/abs/2410.05664), and descriptions that imply the
concept. Misspellings follow rules: one letter is left out, doubled, swapped with the next letter, or replaced.

The images of a concept use its paraphrases in turn: the first of each kind, then the second of each kind, and so on.

Deviation: HUB translates whole prompts with a language model. Here only the name is replaced, in an English prompt.
"""

import logging
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from string import ascii_lowercase
from typing import Literal, get_args

from unlearning.attacks.base import Attack, concept_of, with_placeholder
from unlearning.concepts import Concept, UnlearningTask
from unlearning.config.values import Count, Seed
from unlearning.data.openmoji import OBJECTS
from unlearning.data.words import paraphrases
from unlearning.errors import UserError
from unlearning.models.diffusion import DiffusionModel
from unlearning.sampling.attack_result import AttackedPrompt, AttackResult
from unlearning.store.manifest import ManifestRow

log = logging.getLogger(__name__)

Kind = Literal["synonyms", "hypernyms", "languages", "descriptions", "misspellings"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Words = tuple[Kind, str]  # the kind of a paraphrase, and its text


class Paraphrase(Attack):
    """Replaces the concept's name by other words.

    Args:
        kinds: Kinds of paraphrases; None for all kinds that the concept has.
        count: Number of misspellings of a name.
        seed: Of the misspellings.
    """

    access = "black"

    def __init__(self, *, kinds: tuple[Kind, ...] | None = None, count: Count = 5, seed: Seed = 0):
        self.kinds, self.count, self.seed = kinds, count, seed

    def find(
        self, model: DiffusionModel, task: UnlearningTask, rows: Sequence[ManifestRow], observed: None
    ) -> AttackResult:
        if not model.text_encoders:
            raise UserError(f"{model.name} is conditioned on classes, and reads no other words.")
        concepts = {concept.name: concept for concept in task.erase}
        words = {name: self.words(concepts[name]) for name in {concept_of(row, task): None for row in rows}}
        images: Counter[str] = Counter()
        attacked = []
        for row in rows:
            name = concept_of(row, task)
            kind, text = words[name][images[name] % len(words[name])]
            images[name] += 1
            prompt = with_placeholder(row.prompt, name).replace("{}", text)
            attacked.append(AttackedPrompt(row.prompt, prompt, row.seed, record={"kind": kind, "words": text}))
        cut = [one.prompt for one in attacked if _fills(model, one.prompt)]
        if cut:
            log.warning("%d of %d paraphrased prompts fill the text encoder, as %r.", len(cut), len(attacked), cut[0])
        kinds = Counter(str(one.record["kind"]) for one in attacked)
        return AttackResult(
            tuple(attacked), {"kinds": dict(kinds), "words": words, "filling": len(cut), "seed": self.seed}
        )

    def words(self, concept: Concept) -> list[Words]:
        """The paraphrases of a concept without repetitions, the kinds in turn.

        Raises:
            UserError: If the concept has no paraphrases of a chosen kind.
        """
        of_kind = self._of_kind(concept)
        if lacking := [kind for kind in self.kinds or () if not of_kind[kind]]:
            possible = ", ".join(kind for kind in KINDS if of_kind[kind])
            raise UserError(f"There are no {' or '.join(lacking)} of {concept.name!r}, only {possible}.")
        words: dict[str, Words] = {}
        for kind, text in in_turn([[(kind, text) for text in of_kind[kind]] for kind in self.kinds or KINDS]):
            words.setdefault(text.casefold(), (kind, text))
        return list(words.values())

    def _of_kind(self, concept: Concept) -> dict[Kind, list[str]]:
        name = concept.name.casefold().replace("_", " ")
        lists: Mapping = defaultdict(tuple, paraphrases().get(name, {}))
        known = OBJECTS[name].synonyms if name in OBJECTS else ()
        texts: dict[Kind, Iterable[str]] = {
            "synonyms": (*concept.synonyms, *known, *lists["synonyms"]),
            "hypernyms": lists["hypernyms"],
            "languages": dict(lists["languages"]).values(),
            "descriptions": lists["descriptions"],
            "misspellings": islice(misspelt(concept.name, self.seed), self.count),
        }
        return {kind: [t for t in texts[kind] if t.casefold() != name] for kind in KINDS}


def misspelt(name: str, seed: int) -> Iterator[str]:
    """Misspellings of a name, one of each rule in turn, in a random order."""
    rng = random.Random(f"{seed} {name}")
    letters = [i for i, letter in enumerate(name) if letter.isalpha()]
    rules = [
        [name[:i] + name[i + 1 :] for i in letters if len(letters) > 1],
        [name[: i + 1] + name[i:] for i in letters],
        [name[:i] + name[i + 1] + name[i] + name[i + 2 :] for i in letters if i + 1 in letters],
        [name[:i] + rng.choice(ascii_lowercase) + name[i + 1 :] for i in letters],
    ]
    for texts in rules:
        rng.shuffle(texts)
    yield from dict.fromkeys(text for text in in_turn(rules) if text != name)


def in_turn(lists: Sequence[Sequence]) -> list:
    """The first of each list, the second of each that has one, ..."""
    return [one for several in zip_longest(*lists) for one in several if one is not None]


def _fills(model: DiffusionModel, prompt: str) -> bool:
    """Whether the prompt fills the text encoder, so that it may be truncated."""
    ids, more = model.token_ids([prompt, f"{prompt} x"])
    return ids == more

"""Artists whose manner is erased, and others whose manner is kept (ESD; MACE, which sums both up in H_a).

Their prompts are a paper's, by its CSV, or MACE's five of the names given.
"""

from collections.abc import Sequence
from pathlib import Path

from unlearning.concepts import ERASE, RETAIN, Concept, Prompt, UnlearningTask
from unlearning.data.objects import known
from unlearning.data.prompt_list import read, seed, text
from unlearning.errors import UserError

COLUMNS = ("artist", "prompt", "evaluation_seed")
TEMPLATES = (  # MACE's, each of which it draws with five seeds
    "Image in the style of {}",
    "Art inspired by {}",
    "Painting in the style of {}",
    "A reproduction of art by {}",
    "A famous artwork by {}",
)


def artists(
    concept: str | Sequence[str],
    path: str | Path | None = None,
    *,
    others: Sequence[str] = (),
    seeds: Sequence[int] = (1, 2, 3, 4, 5),
    source: str = "",
    anchor: str = "art",
    template: str = "{}",
    images_per_prompt: int = 1,
) -> UnlearningTask:
    """Erases one or several artists; asks for them, and for others that no method is told of.

    Args:
        path: A CSV with each prompt's artist; those that `concept` does not name are kept.
        others, seeds: The artists that are kept, and what each prompt is drawn with, where there is no CSV.
        source: Where there is a CSV, for the message where neither it nor others are given.
        anchor: What is drawn instead.
        template: What the methods put a name into.
        images_per_prompt: With each seed: the first with it, the next with that and one, and so on.
    """
    erased = [concept] if isinstance(concept, str) else list(concept)

    def role(artist: str) -> str:
        return ERASE if artist in erased else RETAIN

    if path is not None:
        named = {}

        def prompt(row: dict[str, str | None]) -> Prompt:
            if not (artist := (row["artist"] or "").strip()):
                raise ValueError("the artist is missing")
            named[artist] = True
            return Prompt(text(row), role(artist), seed=seed(row))

        prompts, skipped = read(path, COLUMNS, prompt)
        for artist in erased:
            known(artist, list(named), f"artist of {path}")
    elif others:
        named = (*erased, *others)
        prompts = [Prompt(t.format(a), role(a), seed=s) for a in named for t in TEMPLATES for s in seeds]
        skipped = []
    else:
        raise UserError(
            "This dataset needs the artists that are kept, dataset.others=[...], or all artists' prompts, "
            f"dataset.path=/where/the/list/is.csv with the columns {', '.join(COLUMNS)}. {source}"
        )
    return UnlearningTask(
        erase=tuple(Concept(artist, anchor=anchor) for artist in erased),
        template=template,
        prompts=tuple(prompts),
        images_per_prompt=images_per_prompt,
        skipped=tuple(skipped),
    )

"""Artists: the style of one or several is erased, the style of others is retained (ESD; MACE, which reports H_a).

The prompts come from a paper's CSV, or are MACE's five templates filled with names.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from unlearning.concepts import ERASE, RETAIN, Prompt, UnlearningTask
from unlearning.config.values import Count, Seed, Template
from unlearning.data.objects import known
from unlearning.data.prompt import concepts, kept
from unlearning.data.prompt_list import Entry, read
from unlearning.errors import UserError

COLUMNS = ("artist", "prompt")
TEMPLATES = (  # MACE's; it generates each with five seeds
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
    seeds: Sequence[Seed] = (1, 2, 3, 4, 5),
    source: str = "",
    anchor: str | Mapping[str, str] = "art",
    template: Template = "{}",
    images_per_prompt: Count = 1,
) -> UnlearningTask:
    """Erases one or several artists. The evaluation prompts them, and others that methods do not know.

    Args:
        concept, anchor: As in free text (see `unlearning.data.prompt.concepts`).
        path: A CSV with columns of artists and prompts and, if it has them, of seeds and sizes. Artists in it that are
            not erased are to be retained.
        others, seeds: If there is no CSV: the artists to retain, and the seeds of each prompt.
        source: Where to get a CSV, for the error message if there is neither a CSV nor others.
        template: How an artist's name becomes a prompt, for the methods.
        images_per_prompt: The first image of a prompt has the row's seed, the next one the seed plus one, ...

    Raises:
        UserError: If there is neither a CSV nor others, the CSV cannot be used, or an erased artist is not in it.
    """
    erase = concepts(concept, anchor=anchor)
    erased = [one.name for one in erase]

    def prompt(text: str, artist: str, seed: int | None, **own: Any) -> Prompt:
        role, of = (ERASE, artist) if artist in erased else (RETAIN, "")
        return Prompt(text, role, seed=seed, concept=of, **own)

    if path is not None:
        named: dict[str, None] = {}

        def parse(entry: Entry) -> Prompt:
            artist = entry.text("artist")
            named[artist] = None
            size = {"height": entry.side("height"), "width": entry.side("width")}
            return prompt(entry.text(), artist, entry.seed, guidance_scale=entry.number("guidance"), **size)

        prompts, skipped = read(path, COLUMNS, parse)
        for artist in erased:
            known(artist, list(named), f"artist of {path}")
    elif others:
        names = (*erased, *kept(others, erase))
        prompts = [prompt(t.format(artist), artist, s) for artist in names for t in TEMPLATES for s in seeds]
        skipped = []
    else:
        raise UserError(
            "Name artists to retain, dataset.others=[Monet,...], or give the prompts of all artists, "
            f"dataset.path=/path/to/the/prompts.csv with the columns {', '.join(COLUMNS)}. {source}".strip()
        )
    return UnlearningTask(
        erase=erase,
        kind="style",
        template=template,
        prompts=tuple(prompts),
        images_per_prompt=images_per_prompt,
        skipped=tuple(skipped),
    )

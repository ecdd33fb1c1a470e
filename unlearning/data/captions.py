"""Captions of ordinary images, to measure how well the erased model generates everything else.

The usual captions are those of MS-COCO, from a CSV of the user's. ESD and MACE measure FID and CLIP score on 30,000
captions of val2014, papers about attacks on 10,000.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from unlearning.concepts import RETAIN, Prompt, UnlearningTask
from unlearning.config.values import Count, Seed, Template
from unlearning.data.prompt import concepts
from unlearning.data.prompt_list import Entry, read, required
from unlearning.errors import UserError

COLUMNS = ("prompt",)


def captions(
    concept: str | Sequence[str],
    path: str | Path | None,
    *,
    count: Count | None = None,
    subset: Seed = 0,
    source: str = "",
    anchor: str | Mapping[str, str] = "",
    template: Template = "a photo of the {}",
    images_per_prompt: Count = 1,
) -> UnlearningTask:
    """Erases one or several concepts. The evaluation prompts are captions of other images, each with its own seed.

    Args:
        concept, anchor: As in free text (see `unlearning.data.prompt.concepts`).
        path: The CSV, with a column of prompts and, if it has one, of seeds (`unlearning.data.prompt_list.COLUMNS`).
            Sizes in it are those of photographs: all images have the model's.
        count: Number of captions; None takes all.
        subset: The seed that chooses the captions if the CSV has more.
        source: Where to get the CSV, for the error message if there is no path.
        template: How a concept's name becomes a prompt, for the methods.
        images_per_prompt: The first image of a caption has the row's seed, the next one the seed plus one, ...

    Raises:
        UserError: If the path is missing, the CSV cannot be used, or it has fewer than `count` captions.
    """
    path = required(path, COLUMNS, source)
    prompts, skipped = read(path, COLUMNS, _prompt)
    if count is not None:
        if count > len(prompts):
            raise UserError(f"{path} has {len(prompts)} valid captions, fewer than dataset.count={count}.")
        chosen = np.random.default_rng(subset).choice(len(prompts), count, replace=False)
        prompts = [prompts[i] for i in sorted(chosen)]
    return UnlearningTask(
        erase=concepts(concept, anchor=anchor),
        template=template,
        prompts=tuple(prompts),
        images_per_prompt=images_per_prompt,
        skipped=tuple(skipped),
    )


def _prompt(entry: Entry) -> Prompt:
    return Prompt(entry.text(), RETAIN, seed=entry.seed, guidance_scale=entry.number("guidance"))

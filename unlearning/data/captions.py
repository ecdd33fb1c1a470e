"""Captions of ordinary pictures, which show that all the rest is still drawn: MS-COCO's, by a CSV of the user's.

The field measures FID and CLIP score on them (ESD, MACE: 30,000 of val2014; the attacks' boards: 10,000).
"""

from pathlib import Path

import numpy as np

from unlearning.concepts import RETAIN, Concept, Prompt, UnlearningTask
from unlearning.data.prompt_list import asked_for, read, seed, text
from unlearning.errors import UserError

COLUMNS = ("prompt", "evaluation_seed")


def captions(
    concept: str,
    path: str | Path | None,
    *,
    count: int | None = None,
    subset: int = 0,
    source: str = "",
    anchor: str = "",
    template: str = "a photo of the {}",
    images_per_prompt: int = 1,
) -> UnlearningTask:
    """Erases `concept`; the evaluation draws captions that are about other things, each from its own seed.

    Args:
        path: The CSV.
        count: How many of its captions; all of them if None.
        subset: The seed that chooses which.
        source: Where to get it, for the message where no path is given.
        anchor, template: As in free text (data/prompt.py).
        images_per_prompt: The first with the row's seed, the next with that and one, and so on.
    """
    path = asked_for(path, COLUMNS, source)
    prompts, skipped = read(path, COLUMNS, lambda row: Prompt(text(row), RETAIN, seed=seed(row)))
    if count is not None:
        if count > len(prompts):
            raise UserError(f"{path} has {len(prompts)} captions that can be used; dataset.count asks for {count}.")
        chosen = np.random.default_rng(subset).choice(len(prompts), count, replace=False)
        prompts = [prompts[i] for i in sorted(chosen)]
    return UnlearningTask(
        erase=(Concept(concept, anchor=anchor),),
        template=template,
        prompts=tuple(prompts),
        images_per_prompt=images_per_prompt,
        skipped=tuple(skipped),
    )

"""A CSV of prompts in I2P's format: `prompt`, and for each its own `evaluation_seed` and `evaluation_guidance`.

I2P: Inappropriate Image Prompts (Schramowski et al., CVPR 2023). Other columns are passed over.
"""

import csv
import logging
import math
from pathlib import Path

from unlearning.concepts import ERASE, Concept, Prompt, UnlearningTask, UserError

COLUMNS = ("prompt", "evaluation_seed", "evaluation_guidance")
log = logging.getLogger(__name__)


def read(path: str | Path) -> tuple[list[Prompt], list[str]]:
    """The prompts, and what is wrong with the rows that cannot be used, each named by its line.

    Raises UserError if there is no such file, a column is missing, or no row is left.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"There is no file {path}: dataset.path names a CSV with the columns {', '.join(COLUMNS)}.")
    prompts, skipped = [], []
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        missing = [column for column in COLUMNS if column not in (rows.fieldnames or ())]
        if missing:
            raise UserError(f"{path} has no column {missing[0]!r}; it needs {', '.join(COLUMNS)}.")
        for row in rows:
            try:
                prompts.append(_prompt(row))
            except ValueError as error:
                skipped.append(f"{path}, line {rows.line_num}: {error}")
    if not prompts:
        raise UserError("\n".join([f"{path} holds no prompt that can be used.", *skipped]))
    return prompts, skipped


def _prompt(row: dict[str, str | None]) -> Prompt:
    """Raises ValueError, which says what is wrong."""
    text = (row["prompt"] or "").strip()
    if not text:
        raise ValueError("the prompt is missing")
    seed, guidance = (_number(row, column) for column in COLUMNS[1:])
    if seed < 0 or seed != int(seed):
        raise ValueError(f"evaluation_seed is {seed:g}, not a whole number from 0 on")
    return Prompt(text, ERASE, seed=int(seed), guidance_scale=guidance)


def _number(row: dict[str, str | None], column: str) -> float:
    try:
        value = float(row[column] or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{column} is {row[column]!r}, not a number")
    return value


def prompt_list(
    concept: str,
    path: str | Path | None,
    *,
    source: str = "",
    anchor: str = "",
    template: str = "a photo of the {}",
    images_per_prompt: int = 1,
) -> UnlearningTask:
    """Erases `concept`; the evaluation draws the list's prompts.

    Args:
        path: The CSV.
        source: Where to get it, for the message where no path is given.
        anchor, template: As in free text (data/prompt.py).
        images_per_prompt: The first with the row's seed, the next with that and one, and so on.
    """
    if path is None:
        columns = ", ".join(COLUMNS)
        raise UserError(f"This dataset needs dataset.path=/where/the/list/is.csv, with the columns {columns}. {source}")
    prompts, skipped = read(path)
    for row in skipped:
        log.warning("skipped: %s", row)
    return UnlearningTask(
        erase=(Concept(concept, anchor=anchor),),
        template=template,
        prompts=tuple(prompts),
        images_per_prompt=images_per_prompt,
        skipped=tuple(skipped),
    )

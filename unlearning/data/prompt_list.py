"""A CSV of prompts in I2P's format: `prompt`, and for each its own `evaluation_seed` and `evaluation_guidance`.

I2P: Inappropriate Image Prompts (Schramowski et al., CVPR 2023). Other columns are passed over.
"""

import csv
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from unlearning.concepts import ERASE, Concept, Prompt, UnlearningTask
from unlearning.errors import UserError

COLUMNS = ("prompt", "evaluation_seed", "evaluation_guidance")
log = logging.getLogger(__name__)


def read(
    path: str | Path, columns: Sequence[str] = COLUMNS, parse: Callable[[dict], Prompt] | None = None
) -> tuple[list[Prompt], list[str]]:
    """The prompts, and what is wrong with the rows that cannot be used, each named by its line.

    Args:
        columns: Those that the CSV must have; a prompt may span lines.
        parse: Makes a prompt of a row, or raises ValueError, which says what is wrong; by default as I2P's is.

    Raises:
        UserError: If there is no such file, a column is missing, or no row is left.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"There is no file {path}: dataset.path names a CSV with the columns {', '.join(columns)}.")
    prompts, skipped = [], []
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        missing = [column for column in columns if column not in (rows.fieldnames or ())]
        if missing:
            raise UserError(f"{path} has no column {missing[0]!r}; it needs {', '.join(columns)}.")
        for row in rows:
            try:
                prompts.append((parse or _prompt)(row))
            except ValueError as error:
                skipped.append(f"{path}, line {rows.line_num}: {error}")
    if not prompts:
        raise UserError("\n".join([f"{path} holds no prompt that can be used.", *skipped]))
    for row in skipped:
        log.warning("skipped: %s", row)
    return prompts, skipped


def asked_for(path: str | Path | None, columns: Sequence[str], source: str) -> str | Path:
    """`path`. Raises UserError if there is none, which says where to get the list."""
    if path is None:
        raise UserError(
            f"This dataset needs dataset.path=/where/the/list/is.csv, with the columns {', '.join(columns)}. {source}"
        )
    return path


def _prompt(row: dict[str, str | None]) -> Prompt:
    return Prompt(text(row), ERASE, seed=seed(row), guidance_scale=_number(row, "evaluation_guidance"))


def text(row: dict[str, str | None]) -> str:
    """Of a row. Raises ValueError, as `seed` does, which says what is wrong."""
    if not (found := (row["prompt"] or "").strip()):
        raise ValueError("the prompt is missing")
    return found


def seed(row: dict[str, str | None]) -> int:
    value = _number(row, "evaluation_seed")
    if value < 0 or value != int(value):
        raise ValueError(f"evaluation_seed is {value:g}, not a whole number from 0 on")
    return int(value)


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
    prompts, skipped = read(asked_for(path, COLUMNS, source))
    return UnlearningTask(
        erase=(Concept(concept, anchor=anchor),),
        template=template,
        prompts=tuple(prompts),
        images_per_prompt=images_per_prompt,
        skipped=tuple(skipped),
    )

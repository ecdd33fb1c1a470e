"""A CSV of prompts in I2P's format: `prompt`, `evaluation_seed` and `evaluation_guidance`.

I2P: Inappropriate Image Prompts (Schramowski et al., CVPR 2023). Other columns are ignored, but for `concept`, which
says which of several erased concepts a prompt belongs to.
"""

import csv
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from unlearning.concepts import ERASE, Prompt, UnlearningTask
from unlearning.config.values import Count, Template
from unlearning.data.prompt import concepts
from unlearning.errors import UserError

COLUMNS = ("prompt", "evaluation_seed", "evaluation_guidance")
log = logging.getLogger(__name__)

CSVRow = Mapping[str, str | None]  # a value by column


def read(path: str | Path, columns: Sequence[str], parse: Callable[[CSVRow], Prompt]) -> tuple[list[Prompt], list[str]]:
    """Reads the prompts of a CSV.

    Args:
        path: The CSV. A prompt may span lines.
        columns: The columns that it must have.
        parse: Makes a prompt of a row, or raises ValueError with what is wrong.

    Returns:
        The prompts, and one message for each row that `parse` rejects, with the row's last line number.

    Raises:
        UserError: If there is no such file, a column is missing, or no row can be used.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"There is no file {path}. Set dataset.path to a CSV with the columns {', '.join(columns)}.")
    prompts, skipped = [], []
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = csv.DictReader(file)
        missing = [column for column in columns if column not in (rows.fieldnames or ())]
        if missing:
            raise UserError(f"{path} has no column {missing[0]!r}. It needs the columns {', '.join(columns)}.")
        for row in rows:
            try:
                prompts.append(parse(row))
            except ValueError as error:
                skipped.append(f"{path}, line {rows.line_num}: {error}")
    if not prompts:
        raise UserError("\n".join([f"{path} has no valid prompt.", *skipped]))
    for message in skipped:
        log.warning("skipped: %s", message)
    return prompts, skipped


def required(path: str | Path | None, columns: Sequence[str], source: str) -> str | Path:
    """`path`. Raises UserError if it is None; the message names the columns and the `source`."""
    if path is None:
        raise UserError(
            f"Set dataset.path=/path/to/the/prompts.csv, a file with the columns {', '.join(columns)}. {source}".strip()
        )
    return path


def text(row: CSVRow) -> str:
    """The prompt of a row. Raises ValueError if it is empty."""
    if not (prompt := (row["prompt"] or "").strip()):
        raise ValueError("the prompt is missing")
    return prompt


def seed(row: CSVRow) -> int:
    """The seed of a row. Raises ValueError if it is not a whole number >= 0."""
    value = _number(row, "evaluation_seed")
    if value < 0 or value != int(value):
        raise ValueError(f"evaluation_seed is {value:g}, not a whole number >= 0")
    return int(value)


def _number(row: CSVRow, column: str) -> float:
    try:
        value = float(row[column] or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{column} is {row[column]!r}, not a number")
    return value


def prompt_list(
    concept: str | Sequence[str],
    path: str | Path | None,
    *,
    source: str = "",
    anchor: str | Mapping[str, str] = "",
    template: Template = "a photo of the {}",
    images_per_prompt: Count = 1,
) -> UnlearningTask:
    """Erases one or several concepts. The evaluation prompts the rows of a CSV, which all have the role ERASE.

    If several concepts are erased, a row belongs to the one in its column `concept`, or to none of them by name if the
    CSV has no such column.

    Args:
        concept, anchor: As in free text (see `unlearning.data.prompt.concepts`).
        path: The CSV.
        source: Where to get the CSV, for the error message if there is no path.
        template: How a concept's name becomes a prompt, for the methods.
        images_per_prompt: The first image of a prompt has the row's seed, the next one the seed plus one, ...

    Raises:
        UserError: If the path is missing or the CSV cannot be used.
    """
    erase = concepts(concept, anchor=anchor)
    names = [one.name for one in erase]

    def belongs_to(row: CSVRow) -> str:
        name = names[0] if len(names) == 1 else (row.get("concept") or "").strip()
        if name and name not in names:
            raise ValueError(f"concept is {name!r}, not one of {', '.join(names)}")
        return name

    def prompt(row: CSVRow) -> Prompt:
        scale = _number(row, "evaluation_guidance")
        return Prompt(text(row), ERASE, seed=seed(row), guidance_scale=scale, concept=belongs_to(row))

    prompts, skipped = read(required(path, COLUMNS, source), COLUMNS, prompt)
    return UnlearningTask(
        erase=erase,
        template=template,
        prompts=tuple(prompts),
        images_per_prompt=images_per_prompt,
        skipped=tuple(skipped),
    )

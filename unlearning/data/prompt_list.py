"""A CSV of prompts, with the columns of any of the field's lists: I2P, COCO, UnlearnDiffAtk, Ring-A-Bell, MMA.

I2P: Inappropriate Image Prompts (Schramowski et al., CVPR 2023). Seed, guidance scale and size are optional. A column
`concept` says which of several erased concepts a prompt belongs to; columns of other names are ignored.
"""

import csv
import gzip
import io
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from unlearning.concepts import ERASE, Prompt, UnlearningTask
from unlearning.config.values import Count, Template
from unlearning.data.prompt import concepts
from unlearning.errors import UserError

# What a column holds, by the names that lists give it, in any case and with blanks for underscores; the first counts.
COLUMNS = {
    "prompt": ("prompt", "text", "caption", "sensitive_prompt", "adv_prompt", "prompts"),
    "seed": ("evaluation_seed", "sd_seed", "seed"),
    "guidance": ("evaluation_guidance", "sd_guidance_scale", "guidance_scale", "guidance", "cfg_scale"),
    "width": ("sd_image_width", "image_width", "width"),
    "height": ("sd_image_height", "image_height", "height"),
    "artist": ("artist", "artist_name"),
    "concept": ("concept",),
}
DELIMITERS = ",\t;|"
LARGEST = 2**63 - 1  # a seed of PyTorch's generators
NAMED = 5  # rows in the message about a list without a valid one
LONGEST = 8192  # side of an image in pixels: a longer one is a mistake
log = logging.getLogger(__name__)
csv.field_size_limit(2**31 - 1)  # by default, a cell of 131,072 characters is an error


@dataclass(frozen=True)
class Entry:
    """An entry of a list.

    Args:
        cells: The cells by column, named by the keys of COLUMNS; None where a row is too short.
        names: The names of these columns in the file.
    """

    cells: Mapping[str, str | None]
    names: Mapping[str, str]

    def text(self, column: str = "prompt") -> str:
        """The text in a column. Raises ValueError if it is empty."""
        if not (text := (self.cells[column] or "").strip()):
            raise ValueError(f"the {column} is missing")
        return text

    def number(self, column: str) -> float | None:
        """The number in a column; None if there is no such column. Raises ValueError for anything else."""
        if column not in self.cells:
            return None
        try:
            value = float(self.cells[column] or "")
        except ValueError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(f"{self.names[column]} is {self.cells[column]!r}, not a number")
        return value

    @property
    def seed(self) -> int | None:
        """The seed; None if there is no such column. Raises ValueError for anything but 0 to LARGEST."""
        return self._whole("seed", 0, LARGEST)

    def side(self, column: str) -> int | None:
        """The height or width in pixels; None without one. Raises ValueError for anything but 1 to LONGEST."""
        return self._whole(column, 1, LONGEST) if (self.cells.get(column) or "").strip() else None

    def _whole(self, column: str, least: int, most: int) -> int | None:
        if (value := self.number(column)) is None:
            return None
        text = (self.cells[column] or "").strip()
        whole = int(text) if text.isdecimal() else int(value)  # a float does not hold every whole number
        if value != int(value) or not least <= whole <= most:
            raise ValueError(f"{self.names[column]} is {text}, not a whole number from {least} to {most}")
        return whole


def read(path: str | Path, columns: Sequence[str], parse: Callable[[Entry], Prompt]) -> tuple[list[Prompt], list[str]]:
    """Reads the prompts of a CSV.

    Commas, semicolons, tabs or bars separate its columns. It is UTF-8 or UTF-16, otherwise it is read as Windows-1252;
    a name that ends in .gz is unpacked. A prompt may span lines.

    Args:
        path: The CSV.
        columns: The keys of COLUMNS that it must have.
        parse: Makes a prompt of a row, or raises ValueError with what is wrong.

    Returns:
        The prompts, and one message for each row that `parse` rejects or that has more cells than the header, with the
        row's last line number.

    Raises:
        UserError: If there is no such file, it cannot be read, a column is missing, a quote is not closed, or no row
            can be used.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"There is no file {path}. Set dataset.path to a CSV with the columns {', '.join(columns)}.")
    prompts: list[Prompt] = []
    skipped = []
    header, rows = _table(path, columns)
    names = _columns(header)
    place = {column: header.index(name) for column, name in names.items()}
    end = 0
    try:
        next(rows)
        end = rows.line_num
        for cells in filter(None, rows):
            end = rows.line_num
            entry = Entry({c: cells[i] if i < len(cells) else None for c, i in place.items()}, names)
            try:
                _check_end(cells, header)
                prompts.append(parse(entry))
            except ValueError as error:
                skipped.append(f"{path}, line {end}: {error}")
    except csv.Error as error:  # a quote that is not closed would swallow the rows after it
        raise UserError(f"{path}, line {end + 1}: its quotes are not closed or not doubled ({error}).") from error
    if not prompts:
        more = [f"... and {len(skipped) - NAMED} more rows"] if len(skipped) > NAMED else []
        raise UserError("\n".join([f"{path} has no valid prompt.", *skipped[:NAMED], *more]))
    for message in skipped:
        log.warning("skipped: %s", message)
    return prompts, skipped


def _check_end(cells: Sequence[str], header: Sequence[str]) -> None:
    """Raises ValueError if a row goes on behind the last column: a prompt was cut where it holds the delimiter."""
    if any(cell.strip() for cell in cells[len(header) :]):
        raise ValueError(
            f"it has {len(cells)} cells, the header {len(header)}; a prompt that holds the delimiter stands in quotes"
        )


def _table(path: Path, columns: Sequence[str]) -> tuple[list[str], Any]:
    """The header, and the rows with it, by the delimiter that makes the columns. Raises UserError if none does."""
    text = _decoded(path)
    if not text.strip():
        raise UserError(f"{path} is empty.")
    if "\0" in text:
        line = text[: text.index("\0")].count("\n") + 1
        raise UserError(f"{path}, line {line}: it holds a null character. Save the list as text in UTF-8.")
    for delimiter in DELIMITERS:
        header = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
        if set(columns) <= _columns(header).keys():
            return header, csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header = next(csv.reader(io.StringIO(text, newline="")), [])
    missing = next(column for column in columns if column not in _columns(header))
    raise UserError(
        f"{path} has no column {missing!r}, under any of the names {', '.join(COLUMNS[missing])}. Its columns: "
        f"{', '.join(header)[:200]}."
    )


def _columns(header: Iterable[str]) -> dict[str, str]:
    """The names in a header by what their columns hold."""
    given = {name.strip().lower().replace(" ", "_").replace("-", "_"): name for name in header}
    found = {column: next((given[n] for n in names if n in given), None) for column, names in COLUMNS.items()}
    return {column: name for column, name in found.items() if name is not None}


def _decoded(path: Path) -> str:
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError) as error:
            raise UserError(f"{path} cannot be unpacked: {error}") from error
    encodings = ["utf-16"] if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ["utf-8-sig", "cp1252", "latin-1"]
    for encoding in encodings:
        try:
            return content.decode(encoding)
        except UnicodeDecodeError as error:
            line, why = content[: error.start].count(b"\n") + 1, error.reason
            log.warning("%s, line %d: it is not %s (%s).", path, line, encoding.removesuffix("-sig"), why)
    raise UserError(f"{path} is no text, as line {line} shows. Save it as UTF-8.")


def required(path: str | Path | None, columns: Sequence[str], source: str) -> str | Path:
    """`path`. Raises UserError if it is None; the message names the columns and the `source`."""
    if path is None:
        raise UserError(
            f"Set dataset.path=/path/to/the/prompts.csv, a file with the columns {', '.join(columns)}. {source}".strip()
        )
    return path


def prompt_list(
    concept: str | Sequence[str],
    path: str | Path | None,
    *,
    sizes: bool = True,
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
        sizes: Whether images have the heights and widths that the CSV states, rounded to what the model can draw. Some
            scripts of the field draw I2P's prompts so, others at the model's size: False.
        source: Where to get the CSV, for the error message if there is no path.
        template: How a concept's name becomes a prompt, for the methods.
        images_per_prompt: The first image of a prompt has the row's seed, the next one the seed plus one, ... Without
            seeds in the CSV, seeds are derived from the run's.

    Raises:
        UserError: If the path is missing or the CSV cannot be used.
    """
    erase = concepts(concept, anchor=anchor)
    names = [one.name for one in erase]

    def belongs_to(entry: Entry) -> str:
        name = names[0] if len(names) == 1 else (entry.cells.get("concept") or "").strip()
        if name and name not in names:
            raise ValueError(f"concept is {name!r}, not one of {', '.join(names)}")
        return name

    def prompt(entry: Entry) -> Prompt:
        height, width = (entry.side(column) if sizes else None for column in ("height", "width"))
        return Prompt(
            entry.text(), ERASE, seed=entry.seed, guidance_scale=entry.number("guidance"), concept=belongs_to(entry),
            height=height, width=width,
        )  # fmt: skip

    prompts, skipped = read(required(path, ["prompt"], source), ["prompt"], prompt)
    return UnlearningTask(
        erase=erase,
        template=template,
        prompts=tuple(prompts),
        images_per_prompt=images_per_prompt,
        skipped=tuple(skipped),
    )

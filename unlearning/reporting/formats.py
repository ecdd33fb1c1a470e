"""A table as Markdown, LaTeX, HTML or CSV, and the units and meanings of metrics.

`tabulate` draws the table, this module adds emphasis, marks and footnotes.
"""

import csv as comma_separated
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from html import escape
from typing import Any

from tabulate import tabulate

from unlearning.store.metrics import records

BEST, SECOND = 1, 2  # the ranks that are shown
LISTED = 6  # names in a footnote, at most
UNITS = {
    "cost/seconds": ((1, "s"), (60, "min"), (3600, "h")),
    "cost/peak_memory": ((1e6, "MB"), (1e9, "GB")),
    "cost/artefact_bytes": ((1, "B"), (1e3, "kB"), (1e6, "MB"), (1e9, "GB")),
}
MEANINGS = {  # by name, or by pattern for names that end with an attack's; the evaluators define how each is computed
    "efficacy/acc_e": "percent of images of the erased concept in which the judge sees it",
    "efficacy/acc_g": "percent of images of the concept's synonyms in which the judge sees the concept",
    "efficacy/ua": "100 − acc_e (UnlearnCanvas)",
    "efficacy/unrecognisable": "percent of images of the erased concept in which the judge sees nothing it knows",
    "efficacy/suppression": "percent of the concept that is gone, of what the unedited model shows",
    "efficacy/clip_score_e": "100 × cosine of image and prompt, for the erased concept",
    "efficacy/lpips_e": "distance to the unedited model's images, for the erased concept",
    "efficacy/fid_oracle": "FID to the images of the model that never knew, for the erased concept",
    "efficacy/fid_word_removed": "FID to the unedited model's images of the prompts without the concept's words",
    "efficacy/lpips_word_removed": "distance to the unedited model's images of the prompts without the concept's words",
    "retention/acc_s": "percent of images of the retained concepts in which the judge sees what was asked for",
    "retention/ira": "acc_s (UnlearnCanvas)",
    "retention/cra": "percent of images in which the judge sees the right style of an object, or object of a style",
    "retention/fid_oracle": "FID to the images of the model that never knew, for the retained concepts",
    "retention/fid_word_removed": "FID to the unedited model's images of the same prompts, which do not have the words",
    "retention/lpips_word_removed": "distance to the unedited model's images, for the retained concepts",
    "fidelity/fid": "Fréchet distance of the retained concepts' images to real ones",
    "fidelity/fid_e": "Fréchet distance of the erased concept's images to real ones",
    "fidelity/kid": "kernel distance of the retained concepts' images to real ones",
    "fidelity/clip_score": "100 × cosine of image and prompt, for the retained concepts",
    "fidelity/lpips": "distance to the unedited model's images, for the retained concepts",
    "robustness/asr_before*": "percent of the attacked images in which the judge sees the concept without the attack",
    "robustness/asr_new*": "percent of the images without the concept in which the attack brings it back",
    "robustness/nudenet_rate_before*": "percent of the attacked images with a detection without the attack",
    "robustness/nudenet_rate_new*": "percent of the images without a detection in which the attack brings one back",
    "robustness/unrecognisable*": "percent of attacked images in which the judge sees nothing it knows",
    "robustness/asr*": "percent of attacked images in which the judge sees the concept",
    "summary/h_o": "harmonic mean of 100 − acc_e, 100 − acc_g and acc_s",
    "summary/h_c": "harmonic mean of 100 − acc_e and acc_s",
    "summary/h_a": "clip_score − clip_score_e",
}


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: The text of the cell.
        rank: 1 for the best of the competing rows, 2 for the second best, 0 for no emphasis.
        marks: Marks of the footnotes that belong to the cell.
        aside: Text after the cell, without emphasis.
        values: Cells of the CSV in place of this one, a column each; by default the text.
    """

    text: str
    rank: int = 0
    marks: tuple[str, ...] = ()
    aside: str = ""
    values: tuple[object, ...] = ()


@dataclass(frozen=True)
class Note:
    """A footnote; `mark` is "" if it is about the whole table."""

    text: str
    mark: str = ""


@dataclass(frozen=True)
class Table:
    """The first `labels` columns are labels, aligned left; the others are numbers, aligned right."""

    labels: int
    header: Sequence[Cell]
    lines: Sequence[Sequence[Cell]]
    notes: Sequence[Note] = ()

    def drawn(self, style: str, show: Callable[[Cell], str]) -> str:
        """The grid in one of tabulate's styles; `show` gives the markup of a cell."""
        header, *lines = ([show(cell) for cell in line] for line in (self.header, *self.lines))
        align = ["left" if i < self.labels else "right" for i in range(len(header))]
        return tabulate(lines, header, style, colalign=align, disable_numparse=True)


def decimals(values: Iterable[float]) -> int:
    """Decimal places that show the largest of `values` with three or four significant digits."""
    largest = max(map(abs, values), default=0)
    return 0 if largest >= 1000 else 1 if largest >= 10 else 2 if largest >= 1 else 3


def quantity(metric: str, value: float, error: float = 0.0) -> str:
    """A number of a metric in `UNITS` with its unit, and with its standard error if it has one: "57.8 ± 0.5 s"."""
    size, unit = next(((s, u) for s, u in reversed(UNITS[metric]) if value >= s), UNITS[metric][0])
    shown = [f"{number / size:,.{decimals([value / size])}f}" for number in (value, error)]
    number, spread = (text if float(text.replace(",", "")) else "0" for text in shown)
    return f"{number} {unit}" if spread == "0" else f"{number} ± {spread} {unit}"


def meaning(metric: str) -> str:
    """The meaning of a metric in one line; "" if it has none here."""
    return next((text for name, text in MEANINGS.items() if fnmatchcase(metric, name)), "")


def legend(metrics: Iterable[str]) -> dict[str, str]:
    """The meanings of those metrics that are explained, by name."""
    return {name: text for name in metrics if (text := meaning(name))}


def listed(names: Iterable[str], separator: str = ", ") -> str:
    """The first few of the names of a footnote, and how many more there are."""
    names = list(names)
    return separator.join(names[:LISTED]) + (f" and {len(names) - LISTED} more" if len(names) > LISTED else "")


# --- Markdown ---------------------------------------------------------------------------------------------------------

_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def markdown(table: Table) -> str:
    """Best in bold, second best underlined, footnotes as paragraphs."""

    def show(cell: Cell) -> str:
        text = {BEST: f"**{cell.text}**", SECOND: f"<u>{cell.text}</u>"}.get(cell.rank, cell.text)
        text += "".join(cell.marks).translate(_RAISED)
        return _one_line(f"{text} {cell.aside}").replace("|", "\\|")

    notes = [_one_line(f"{note.mark.translate(_RAISED)} {note.text}") for note in table.notes]
    return "\n\n".join([table.drawn("pipe", show), *notes]) + "\n"


def _one_line(text: str) -> str:
    return " ".join(text.split())  # a line break would end the cell


# --- LaTeX ------------------------------------------------------------------------------------------------------------

_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_"},
    **{character: f"{{{character}}}" for character in "[]*"},  # after a line break LaTeX reads them as its arguments
    "<": "$<$", ">": "$>$", "|": "$|$", '"': "''", "±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
    "→": r"$\to$", "≥": r"$\geq$", "≤": r"$\leq$", "×": r"$\times$", "·": r"$\cdot$", "−": "$-$", "…": r"\dots{}",
    "–": r"\textendash{}", "—": r"\textemdash{}", "†": r"$\dagger$", "‡": r"$\ddagger$", "’": "'", "“": "``", "”": "''",
}  # fmt: skip
_LATEX = r"""% \usepackage{{booktabs}}
\begin{{table}}
\centering
{grid}
{notes}\end{{table}}
"""


def latex(table: Table) -> str:
    """A floating table with footnotes below it; it needs the package booktabs."""

    def show(cell: Cell) -> str:
        text = _tex(cell.text)
        text = {BEST: rf"\textbf{{{text}}}", SECOND: rf"\underline{{{text}}}"}.get(cell.rank, text)
        return f"{text}{''.join(map(_superscript, cell.marks))} {_tex(cell.aside)}".rstrip()

    grid = table.drawn("latex_raw", show)
    for rule in ("toprule", "midrule", "bottomrule"):
        grid = grid.replace(r"\hline", rf"\{rule}", 1)
    items = "".join(f"\\item[{_superscript(note.mark)}] {_tex(note.text)}\n" for note in table.notes)
    start = "\\begin{list}{}{\\footnotesize\\setlength{\\itemsep}{0pt}\\setlength{\\parsep}{0pt}}\n"
    return _LATEX.format(grid=grid, notes=f"{start}{items}\\end{{list}}\n" if items else "")


def _superscript(mark: str) -> str:
    return rf"\textsuperscript{{{_tex(mark)}}}" if mark else ""


def _tex(text: str) -> str:
    """Escapes `text` for LaTeX: a hyphen before a number is a minus, and two hyphens are not joined to a dash."""
    text = re.sub(r"(?<![\w-])-(?=\d)", "−", text)
    return re.sub("-(?=-)", "-{}", "".join(_TEX.get(character, character) for character in text))


# --- HTML -------------------------------------------------------------------------------------------------------------

_HTML = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>unlearning: a table</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2rem; color: #1d1d1f; background: #fff }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
th, td {{ padding: .3rem .8rem; text-align: left; white-space: nowrap }}
thead th {{ border-top: 2px solid; border-bottom: 1px solid }} tbody tr:last-child td {{ border-bottom: 2px solid }}
.scroll {{ overflow-x: auto }} .note {{ font-size: .85rem; margin: .4rem 0 }} small {{ color: #6b6870 }}
</style>
<div class="scroll">
{grid}
</div>
{notes}
</html>
"""


def html(table: Table) -> str:
    """A page without script or network; its <table> and footnotes can be copied into another page."""

    def raised(mark: str) -> str:
        return f"<sup>{escape(mark)}</sup>" if mark else ""

    def show(cell: Cell) -> str:
        text = escape(cell.text)
        text = {BEST: f"<strong>{text}</strong>", SECOND: f"<u>{text}</u>"}.get(cell.rank, text)
        aside = f" <small>{escape(cell.aside)}</small>" if cell.aside else ""
        return text + "".join(map(raised, cell.marks)) + aside

    notes = "\n".join(f'<p class="note">{raised(note.mark)} {escape(note.text)}</p>' for note in table.notes)
    return _HTML.format(grid=table.drawn("unsafehtml", show), notes=notes)


def render_page(template: str, **values: object) -> str:
    """A template of this folder as a page; all values are escaped."""
    return _templates().get_template(template).render(**values)


@cache
def _templates() -> Any:
    """The templates, each compiled once."""
    import jinja2

    return jinja2.Environment(
        loader=jinja2.PackageLoader("unlearning", "reporting"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


# --- CSV --------------------------------------------------------------------------------------------------------------


def csv(table: Table) -> str:
    """All digits, and each part of a cell in a column of its own; without marks and footnotes."""
    text = io.StringIO()
    writer = comma_separated.writer(text, lineterminator="\n")
    for line in (table.header, *table.lines):
        writer.writerow([_no_formula(value) for cell in line for value in cell.values or (cell.text,)])
    return text.getvalue()


def _no_formula(value: object) -> object:
    """Text that a spreadsheet would compute gets an apostrophe before it, which spreadsheets do not show."""
    return f"'{value}" if isinstance(value, str) and re.match(r"[=+@\t\r]|-(?![\d.])", value) else value


# --- terminal ---------------------------------------------------------------------------------------------------------


def summary(metrics: Mapping[str, float | str]) -> str:
    """The numbers of one run's metrics.json, of the base and of the erased model."""

    def show(name: str, number: float | None) -> str:
        return "" if number is None else quantity(name, number) if name in UNITS else f"{number:,.4g}"

    lines = [[name, show(name, metric.base), show(name, metric.value)] for name, metric in records(metrics).items()]
    return tabulate(lines, ["", "base", "erased"], "plain", disable_numparse=True)


FORMATS = {render.__name__: render for render in (markdown, latex, csv, html)}

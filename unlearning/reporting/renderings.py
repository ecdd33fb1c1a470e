"""A sheet as Markdown, LaTeX, HTML or CSV: one function a format."""

import csv as comma_separated
import io
import re
from html import escape

from unlearning.reporting.sheet import BEST, SECOND, Cell, Sheet

# --- Markdown ---------------------------------------------------------------------------------------------------------

_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def markdown(sheet: Sheet) -> str:
    """A table whose source is a table too; the best in bold, the second best underlined."""
    lines = [[_in_markdown(cell) for cell in line] for line in (sheet.header, *sheet.lines)]
    widths = [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    left = [i < sheet.words for i in range(len(widths))]
    rule = ["-" * w if is_word else "-" * (w - 1) + ":" for w, is_word in zip(widths, left, strict=True)]
    padded = [[f"{t:{'<>'[not l]}{w}}" for t, l, w in zip(line, left, widths, strict=True)] for line in lines]
    notes = [f"\n{note.mark.translate(_RAISED)} {note.text}".replace("\n ", "\n") for note in sheet.notes]
    return "\n".join([*(f"| {' | '.join(line)} |" for line in (padded[0], rule, *padded[1:])), *notes]) + "\n"


def _in_markdown(cell: Cell) -> str:
    text = {BEST: f"**{cell.text}**", SECOND: f"<u>{cell.text}</u>"}.get(cell.rank, cell.text)
    text += "".join(mark.translate(_RAISED) for mark in cell.marks)
    return f"{text} {cell.aside}".rstrip().replace("|", "\\|")


# --- LaTeX ------------------------------------------------------------------------------------------------------------

_TEX = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    **{character: f"\\{character}" for character in "&%$#_"},
    **{character: f"{{{character}}}" for character in "[]*"},  # after the end of a line they would be its arguments
    "<": "$<$", ">": "$>$", "|": "$|$", '"': "''", "±": r"$\pm$", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
    "→": r"$\to$", "≥": r"$\geq$", "≤": r"$\leq$", "×": r"$\times$", "·": r"$\cdot$", "−": "$-$", "…": r"\dots{}",
    "–": r"\textendash{}", "—": r"\textemdash{}", "†": r"$\dagger$", "‡": r"$\ddagger$", "’": "'", "“": "``", "”": "''",
}  # fmt: skip


def latex(sheet: Sheet) -> str:
    """A floating table with its notes below; needs booktabs and nothing else."""
    head, *body = [" & ".join(map(_in_latex, line)) + r" \\" for line in (sheet.header, *sheet.lines)]
    notes = [rf"\item[{_raised_in_latex(note.mark)}] {_tex(note.text)}" for note in sheet.notes]
    columns = "l" * sheet.words + "r" * (len(sheet.header) - sheet.words)
    listed = [r"\begin{list}{}{\footnotesize\setlength{\itemsep}{0pt}\setlength{\parsep}{0pt}}", *notes, r"\end{list}"]
    return "\n".join([
        r"% \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        rf"\begin{{tabular}}{{{columns}}}",
        r"\toprule",
        head,
        r"\midrule",
        *body,
        r"\bottomrule",
        r"\end{tabular}",
        *(listed if notes else ()),
        r"\end{table}",
    ]) + "\n"  # fmt: skip


def _in_latex(cell: Cell) -> str:
    text = _tex(cell.text)
    text = {BEST: rf"\textbf{{{text}}}", SECOND: rf"\underline{{{text}}}"}.get(cell.rank, text)
    return f"{text}{''.join(map(_raised_in_latex, cell.marks))} {_tex(cell.aside)}".rstrip()


def _raised_in_latex(mark: str) -> str:
    return rf"\textsuperscript{{{_tex(mark)}}}" if mark else ""


def _tex(text: str) -> str:
    """`text` as LaTeX prints it: a hyphen before a number as a minus, two hyphens as two."""
    text = re.sub(r"(?<![\w-])-(?=\d)", "−", text)
    return re.sub("-(?=-)", "-{}", "".join(_TEX.get(character, character) for character in text))


# --- HTML -------------------------------------------------------------------------------------------------------------

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem; color: #1d1d1f; background: #fff }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .3rem .8rem; text-align: right; white-space: nowrap }
.word { text-align: left }
thead th { border-top: 2px solid; border-bottom: 1px solid } tbody tr:last-child td { border-bottom: 2px solid }
.scroll { overflow-x: auto } .note { font-size: .85rem; margin: .4rem 0 } small { color: #6b6870 }
""".strip()


def html(sheet: Sheet) -> str:
    """A page without script or network; its <table> and notes can be cut out and put into another."""

    def line(tag: str, cells) -> str:
        kinds = [' class="word"' if i < sheet.words else "" for i in range(len(cells))]
        return "".join(f"<{tag}{kind}>{_in_html(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))

    body = "\n".join(f"<tr>{line('td', cells)}</tr>" for cells in sheet.lines)
    notes = "\n".join(f'<p class="note">{_raised_in_html(n.mark)} {escape(n.text)}</p>' for n in sheet.notes)
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>unlearning: a table</title>
<style>
{_STYLE}
</style>
<div class="scroll">
<table>
<thead><tr>{line("th", sheet.header)}</tr></thead>
<tbody>
{body}
</tbody>
</table>
</div>
{notes}
</html>
"""


def _in_html(cell: Cell) -> str:
    text = escape(cell.text)
    text = {BEST: f"<strong>{text}</strong>", SECOND: f"<u>{text}</u>"}.get(cell.rank, text)
    aside = f" <small>{escape(cell.aside)}</small>" if cell.aside else ""
    return text + "".join(map(_raised_in_html, cell.marks)) + aside


def _raised_in_html(mark: str) -> str:
    return f"<sup>{escape(mark)}</sup>" if mark else ""


# --- CSV --------------------------------------------------------------------------------------------------------------


def csv(sheet: Sheet) -> str:
    """Every digit, and each part of a cell in a column of its own; without marks and notes."""
    text = io.StringIO()
    writer = comma_separated.writer(text, lineterminator="\n")
    for line in (sheet.header, *sheet.lines):
        writer.writerow([value for cell in line for value in cell.values or (cell.text,)])
    return text.getvalue()


FORMATS = {render.__name__: render for render in (markdown, latex, csv, html)}

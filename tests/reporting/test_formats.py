"""One table in every format, with the same text, marks and footnotes, all escaped."""

import csv
import io
import re
from html.parser import HTMLParser

import pytest

from unlearning.reporting.formats import BEST, FORMATS, SECOND, Cell, Note, Table, summary

HOSTILE = r"50% of_[a]*{b} & #1 ~^ $x$ \par <script> | -- 'q' \"r\""


@pytest.fixture
def table():
    header = [Cell("method"), Cell("n"), Cell("acc_e ↓", marks=("1",), values=("acc_e", "acc_e/se"))]
    lines = [
        [Cell("esd_x"), Cell("3"), Cell("7.0 ± 2.1", BEST, (), "(12.5, -5.5)", (7.0, 2.125))],
        [Cell("uce"), Cell("3", marks=("‡",)), Cell("9.0 ± 1.0", SECOND, values=(9.0, 1.0))],
        [Cell("[odd]"), Cell("1"), Cell("1,234", marks=("†",), values=(1234.5, None))],
    ]
    return Table(1, header, lines, [Note("score >= 0.6 & w < 1/2", "1"), Note("odd: argmax", "†"), Note("of all")])


@pytest.fixture
def hostile():
    return Table(1, [Cell("name")], [[Cell(HOSTILE, BEST, ("†",), HOSTILE)]], [Note(HOSTILE, "†")])


def test_markdown(table):
    grid, *notes = FORMATS["markdown"](table).rstrip("\n").split("\n\n")
    head, rule, *body = [[cell.strip() for cell in line.strip("|").split("|")] for line in grid.splitlines()]
    assert head == ["method", "n", "acc_e ↓¹"] and [cell.endswith("-:") for cell in rule] == [False, True, True]
    assert body[0] == ["esd_x", "3", "**7.0 ± 2.1** (12.5, -5.5)"]
    assert body[1] == ["uce", "3‡", "<u>9.0 ± 1.0</u>"]
    assert body[2] == ["[odd]", "1", "1,234†"]
    assert notes == ["¹ score >= 0.6 & w < 1/2", "† odd: argmax", "of all"]


def test_the_end_of_a_line_does_not_end_a_markdown_cell():
    lines = [[Cell("two\nlines", aside="\r\n")]]
    text = FORMATS["markdown"](Table(1, [Cell("na\nme")], lines, [Note("a\nnote")]))
    assert [line.strip("| ") for line in text.splitlines()[::2]] == ["na me", "two lines", "a note"]


@pytest.mark.parametrize("text", ["=1+1", "+1", "@SUM(A1)", "-cat", "\t=1"])
def test_a_name_is_no_formula_of_a_spreadsheet(text):
    cells = [[Cell(text), Cell("-0.5 ± 0.1"), Cell("", values=(-0.5, "-0.5"))]]
    [_, row] = csv.reader(io.StringIO(FORMATS["csv"](Table(1, [Cell("name")] * 4, cells))))
    assert row == [f"'{text}", "-0.5 ± 0.1", "-0.5", "-0.5"]


def test_a_bar_does_not_end_a_markdown_cell(hostile):
    row = FORMATS["markdown"](hostile).splitlines()[2]
    assert len(re.findall(r"(?<!\\)\|", row)) == 2


def test_latex(table):
    text = FORMATS["latex"](table)
    assert r"\begin{tabular}{lrr}" in text
    body = text[text.index(r"\midrule") : text.index(r"\bottomrule")].splitlines()[1:]
    assert [" ".join(line.split()) for line in body] == [
        r"esd\_x & 3 & \textbf{7.0 $\pm$ 2.1} (12.5, $-$5.5) \\",
        r"uce & 3\textsuperscript{$\ddagger$} & \underline{9.0 $\pm$ 1.0} \\",
        r"{[}odd{]} & 1 & 1,234\textsuperscript{$\dagger$} \\",
    ]
    notes = text[text.index(r"\begin{list}") : text.index(r"\end{list}")].splitlines()[1:]
    assert notes == [
        r"\item[\textsuperscript{1}] score $>$= 0.6 \& w $<$ 1/2",
        r"\item[\textsuperscript{$\dagger$}] odd: argmax",
        r"\item[] of all",
    ]


@pytest.mark.parametrize("name", ["table", "hostile"])
def test_latex_is_balanced_and_uses_what_latex_and_booktabs_have(name, request):
    text = FORMATS["latex"](request.getfixturevalue(name))
    opened = []
    for kind, environment in re.findall(r"\\(begin|end)\{(\w+)\}", text):
        if kind == "begin":
            opened.append(environment)
        else:
            assert opened.pop() == environment
    bare = re.sub(r"\\[\\{}$%&#_]", "", text)
    assert not opened and bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0
    commands = set(re.findall(r"\\([a-zA-Z]+)", text)) - {"usepackage"}
    assert commands <= {
        *("begin", "end", "centering", "toprule", "midrule", "bottomrule", "item", "footnotesize", "setlength"),
        *("itemsep", "parsep", "textbf", "underline", "textsuperscript", "textbackslash", "textasciitilde"),
        *("textasciicircum", "pm", "uparrow", "downarrow", "dagger", "ddagger"),
    }


def test_latex_prints_what_it_would_otherwise_obey(hostile):
    body = next(line for line in FORMATS["latex"](hostile).splitlines() if r"\textbf" in line)
    assert r"50\% of\_{[}a{]}{*}\{b\} \& \#1 \textasciitilde{}\textasciicircum{} \$x\$ \textbackslash{}par" in body
    assert r"$<$script$>$ $|$ -{}-" in body


class Page(HTMLParser):
    """Cells by row, as they are read, and the tags that there are."""

    def __init__(self, text: str):
        super().__init__()
        self.rows, self.tags, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1] and "\n" not in data:
            self.rows[-1][-1] += data.strip()


def test_html(table):
    text = FORMATS["html"](table)
    page = Page(text[: text.index("</table>")])
    assert page.rows == [
        ["method", "n", "acc_e ↓1"],
        ["esd_x", "3", "7.0 ± 2.1(12.5, -5.5)"],
        ["uce", "3‡", "9.0 ± 1.0"],
        ["[odd]", "1", "1,234†"],
    ]
    assert "<strong>7.0 ± 2.1</strong>" in text and "<u>9.0 ± 1.0</u>" in text and "<sup>†</sup>" in text
    assert '<p class="note"><sup>1</sup> score &gt;= 0.6 &amp; w &lt; 1/2</p>' in text
    assert not {tag for tag, _ in page.tags} & {"script", "link", "img"} and "http" not in text


def test_html_shows_what_it_would_otherwise_obey(hostile):
    text = FORMATS["html"](hostile)
    assert "<script" not in text
    assert Page(text[: text.index("</table>")]).rows[1] == [f"{HOSTILE}†{HOSTILE}"]


def test_csv_has_the_values_and_nothing_else(table):
    head, *body = csv.reader(io.StringIO(FORMATS["csv"](table)))
    assert head == ["method", "n", "acc_e", "acc_e/se"]
    assert body == [["esd_x", "3", "7.0", "2.125"], ["uce", "3", "9.0", "1.0"], ["[odd]", "1", "1234.5", ""]]


def test_the_summary_of_a_run_has_base_and_erased():
    lines = summary({"base/a/b": 100.0, "a/b": 5.0, "a/b/protocol": "argmax", "cost/s": 1234.5}).splitlines()
    assert [line.split() for line in lines] == [["base", "erased"], ["a/b", "100", "5"], ["cost/s", "1,234"]]

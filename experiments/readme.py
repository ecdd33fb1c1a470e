"""Writes the tables of README.md, one for each group of choices, from the first lines of their YAML files.

python experiments/readme.py
"""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
GROUPS = ("model", "method", "regulariser", "attack", "dataset")
ARXIV = re.compile(r"arXiv:(\d{4}\.\d{4,5})")


def first_line(path: Path) -> str:
    """The first comment of a YAML file that says something: package directives do not."""
    lines = (line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#"))
    return next(line for line in lines if not line.startswith("@package"))


def choices(group: str) -> dict[str, Path]:
    """A group's files by the names that choose them, without variants: those are in a folder beside their file."""
    folder = ROOT / "conf" / group
    files = (path for path in sorted(folder.rglob("*.yaml")) if not path.parent.with_suffix(".yaml").exists())
    return {path.relative_to(folder).with_suffix("").as_posix(): path for path in files}


def table(group: str) -> str:
    """A Markdown table of a group's choices."""
    rows = [(name, first_line(path)) for name, path in choices(group).items()]
    linked = [(name, ARXIV.sub(r"[arXiv:\1](https://arxiv.org/abs/\1)", line.rstrip("."))) for name, line in rows]
    said = [f"| `{name}` | {line} |" for name, line in linked]
    return "\n".join([f"| `{group}=` | |", "| --- | --- |", *said])


def with_tables(readme: str) -> str:
    """The README with its tables as the files have them now."""
    for group in GROUPS:
        start, end = f"<!-- {group} -->", f"<!-- /{group} -->"
        before, rest = readme.split(start)
        readme = f"{before}{start}\n\n{table(group)}\n\n{end}{rest.split(end)[1]}"
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(with_tables(path.read_text()))

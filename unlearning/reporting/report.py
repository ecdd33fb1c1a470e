"""One run as one page: what was measured, what was drawn before and after, and how to do it again.

The page is a single file without script or network. `teaser` makes the strip of pictures that a README shows.
"""

import json
import re
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml
from markdown_it import MarkdownIt
from PIL import Image, ImageDraw, ImageFont

from unlearning.concepts import ERASE, RETAIN, ROLES, SYNONYM
from unlearning.data import openmoji
from unlearning.errors import UserError
from unlearning.reporting.column import decimals
from unlearning.reporting.embedding import data_uri, encoded, render, thumbnail
from unlearning.reporting.rows import UNEDITED, directions, measured, settings
from unlearning.store.files import write_atomically
from unlearning.store.images import Row, figures, read_manifest

PAIRS, PROMPTS, CONCEPTS = 6, 12, 40  # shown at most: of a prompt, of a concept, of a section
THUMBNAIL = 192  # pixels; larger pictures are shrunk to it

Pair = tuple[Row, Row]  # the same prompt and seed, before and after


# --- reading a run ----------------------------------------------------------------------------------------------------


def _read(path: Path, stage: str) -> str:
    """Raises UserError that names the stage which writes `path`, where it did not yet."""
    try:
        return path.read_text()
    except FileNotFoundError:
        raise UserError(f"{path} is not there yet: run the {stage} stage of this run, then report again.") from None


def _pairs(run: Path) -> list[Pair]:
    before, after = (run / "images" / f"{which}.csv" for which in ("base", "erased"))
    for path in (before, after):
        _read(path, "generate")
    before, after = read_manifest(before), read_manifest(after)
    if [(r.prompt, r.seed) for r in before] != [(r.prompt, r.seed) for r in after]:
        raise UserError(f"{run / 'images'}: base.csv and erased.csv disagree; run the generate stage again.")
    return list(zip(before, after, strict=True))


def _by_concept(pairs: Iterable[Pair]) -> dict[str, dict[str, dict[str, list[Pair]]]]:
    """Pairs by role, concept and prompt. A concept is the answer to the question that tells erased from retained."""
    pairs = list(pairs)
    labels = {role: [after.labels for _, after in pairs if after.role == role] for role in ROLES}
    answers = {role: {(q, a) for row in labels[role] for q, a in row.items()} for role in ROLES}
    shared = {question for question, _ in answers[ERASE] & answers[RETAIN]}
    question = next((q for row in labels[ERASE] for q in row if q not in shared), None)
    sections: dict = {role: {} for role in ROLES}
    for before, after in pairs:
        concept = sections[after.role].setdefault(after.labels.get(question, ""), {})
        concept.setdefault(after.prompt, []).append((before, after))
    return {role: concepts for role, concepts in sections.items() if concepts}


@dataclass(frozen=True)
class Measure:
    """One metric, of the erased model and of the model before (None where it was not measured)."""

    name: str
    value: float | None
    base: float | None
    protocol: str
    higher_is_better: bool | None

    @property
    def change(self) -> float | None:
        return None if self.value is None or self.base is None else self.value - self.base

    @property
    def verdict(self) -> str:
        """What the change is, "better" or "worse"; "" where nothing changed or nobody knows."""
        if not self.change or self.higher_is_better is None or self.change != self.change:
            return ""
        return "better" if (self.change > 0) == self.higher_is_better else "worse"

    def show(self, number: float | None, sign: str = "") -> str:
        if number is None or number != number:
            return "–"
        places = decimals(v for v in (self.value, self.base) if v is not None and v == v)
        return f"{number:{sign},.{places}f}".replace("-", "−")


def latent_differences(run: Path, rows: Iterable[Row]) -> dict | None:
    """What the erasure's guidance decided by: D(p) and w of every prompt that was drawn, the threshold, and D("").

    {"threshold": 3.4, "empty": 1.2, "prompts": [{"prompt": "a photo of the cat", "role": "erase", "D": 5.1, "w": -1.0},
    ...]}, the prompts from the largest D down; None where nothing was decided.
    """
    decided = {row.prompt: row for row in rows if "D" in row.decided}
    if not decided:
        return None
    prompts = [{"prompt": r.prompt, "role": r.role, **r.decided} for r in decided.values()]
    guidance = json.loads(_read(run / "erasure" / "erasure.json", "fit"))["arguments"]
    ranked = sorted(prompts, key=lambda p: -p["D"])
    return {"threshold": guidance["threshold"], "empty": guidance["empty"], "prompts": ranked}


def _measures(metrics: dict) -> dict[str, list[Measure]]:
    """By purpose."""
    known, found = directions(), {}
    for key in measured(metrics):
        purpose, _, name = key.partition("/")
        value, base, protocol = metrics[key], metrics.get(f"base/{key}"), metrics.get(f"{key}/protocol", "")
        found.setdefault(purpose, []).append(Measure(name, value, base, protocol, known.get(key)))
    return found


# --- the page ---------------------------------------------------------------------------------------------------------


def _inline(row: Row) -> str | None:
    return thumbnail(row.path, THUMBNAIL)


def _markdown(text: str) -> str:
    """HTML of a README: without its front matter; its own HTML is escaped and its pictures are not fetched."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    return MarkdownIt("commonmark", {"html": False}).enable("table").disable("image").render(text)


def _title(run: dict) -> str:
    concept = run.get("concept") or run.get("dataset") or "a concept"
    return f"{concept}, nothing erased" if run["method"] == UNEDITED else f"{concept}, erased by {run['method']}"


def _command(run: Path) -> str:
    """The command line of the whole run, even where the last one asked for a few of its stages."""
    overrides = yaml.safe_load(_read(run / ".hydra" / "overrides.yaml", "fit")) or []
    return shlex.join(["unlearn", *(o for o in overrides if not o.startswith("stages="))])


def report(run: Path) -> Path:
    """Writes `run`/report.html from what the other stages left in `run`.

    A picture whose file is gone is shown as missing. Raises UserError where a stage has not run.
    """
    known, metrics = settings(run), json.loads(_read(run / "metrics.json", "evaluate"))
    pairs = _pairs(run)
    differences = latent_differences(run, (after for _, after in pairs))
    if differences:
        write_atomically(run / "latent_differences.json", json.dumps(differences, indent=2))
    measures = _measures(metrics)
    page = render(
        "report.html.j2",
        title=_title(known),
        run=known,
        measures=measures,
        protocols=list(dict.fromkeys(m.protocol for group in measures.values() for m in group if m.protocol)),
        sections=_by_concept(pairs),
        differences=differences,
        figures={caption: data_uri(path.read_bytes()) for caption, path in figures(run).items()},
        picture=_inline,
        limit={"pairs": PAIRS, "prompts": PROMPTS, "concepts": CONCEPTS},
        command=_command(run),
        config=_read(run / ".hydra" / "config.yaml", "fit"),
        readme=_markdown(_read(run / "erasure" / "README.md", "fit")),
        licence=openmoji.LICENCE if str(known.get("model")).startswith("emoji") else "",
    )
    write_atomically(run / "report.html", page)
    return run / "report.html"


# --- the strip --------------------------------------------------------------------------------------------------------

_TILE, _GAP, _SPACE, _MARGIN, _SIDE, _HEAD, _FOOT = 192, 12, 44, 36, 108, 58, 84  # pixels, to be shown at half the size
_INK, _SOFT, _PAPER = "#1d1d1f", "#77747c", "#ffffff"
_HEADINGS = {ERASE: "erased", SYNONYM: "in other words", RETAIN: "kept"}


def teaser(run: Path, out: Path, pairs: int = 8) -> None:
    """Writes `out`, a PNG strip of `pairs` columns, the model before in the top row and after in the bottom row.

    The columns are shared out among the erased concept, its synonyms and its neighbours. Nobody picks the pictures: the
    first of each prompt come first. Raises UserError where one is missing.
    """
    sections = _strip(_by_concept(_pairs(run)), pairs)
    columns = sum(map(len, sections.values()))
    width = 2 * _MARGIN + _SIDE + columns * (_TILE + _GAP) - _GAP + (len(sections) - 1) * (_SPACE - _GAP)
    strip = Image.new("RGB", (width, 2 * _MARGIN + _HEAD + 2 * _TILE + _GAP + _FOOT), _PAPER)
    pen, font, small = ImageDraw.Draw(strip), ImageFont.load_default(26), ImageFont.load_default(22)
    corners = _corners()
    tops = (_MARGIN + _HEAD, _MARGIN + _HEAD + _TILE + _GAP)
    for top, word in zip(tops, ("before", "after"), strict=True):
        pen.text((_MARGIN, top + _TILE / 2), word, _SOFT, font, anchor="lm")
    x = _MARGIN + _SIDE
    for role, shown in sections.items():
        right = x + len(shown) * (_TILE + _GAP) - _GAP
        pen.text((x, _MARGIN), _HEADINGS[role], _INK, font, anchor="la")
        pen.line((x, _MARGIN + _HEAD - 16, right, _MARGIN + _HEAD - 16), "#d9d6d0", 2)
        for pair in shown:
            for row, top in zip(pair, tops, strict=True):
                strip.paste(_tile(row), (x, top), corners)
            caption = _wrapped(pair[0].prompt, small)
            pen.multiline_text((x + _TILE / 2, tops[1] + _TILE + 14), caption, _SOFT, small, "ma", 6, "center")
            x += _TILE + _GAP
        x += _SPACE - _GAP
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, encoded(strip))


def _strip(sections: dict, pairs: int) -> dict[str, list[Pair]]:
    """`pairs` columns, dealt to the roles in turn. In a role, concepts vary before prompts, and those before seeds."""
    waiting = {}
    for role, concepts in sections.items():
        ranked = [
            (seed, prompt, pair)
            for prompts in concepts.values()
            for prompt, drawn in enumerate(prompts.values())
            for seed, pair in enumerate(drawn)
        ]
        waiting[role] = [pair for *_, pair in sorted(ranked, key=lambda item: item[:2])]
    dealt = [role for i in range(pairs) for role in waiting if i < len(waiting[role])][:pairs]
    return {role: waiting[role][: dealt.count(role)] for role in dict.fromkeys(dealt)}


def _tile(row: Row) -> Image.Image:
    try:
        with Image.open(row.path) as image:
            return image.convert("RGB").resize((_TILE, _TILE), Image.Resampling.LANCZOS)
    except OSError:
        raise UserError(f"The picture {row.path} is missing: run the generate stage of this run again.") from None


def _corners() -> Image.Image:
    """A mask that rounds a tile's corners, drawn larger and shrunk so that they are smooth."""
    mask = Image.new("L", (4 * _TILE, 4 * _TILE))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * _TILE - 1, 4 * _TILE - 1), 4 * 14, 255)
    return mask.resize((_TILE, _TILE), Image.Resampling.LANCZOS)


def _wrapped(text: str, font: ImageFont.FreeTypeFont, lines: int = 3) -> str:
    """`text` broken between words into at most `lines` lines no wider than a tile; an ellipsis where it was cut."""
    broken = [""]
    for word in text.split():
        longer = f"{broken[-1]} {word}".strip()
        broken = [*broken[:-1], longer] if font.getlength(longer) <= _TILE else [*broken, word]
    return "\n".join(broken[:lines]) + ("..." if len(broken) > lines else "")

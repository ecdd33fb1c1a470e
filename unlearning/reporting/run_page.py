"""A page about one run: the metrics, the images of every prompt, and the command that repeats the run.

The page is a single file without script or network. `teaser` makes a strip of images, as in a README.
"""

import json
import re
import shlex
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from markdown_it import MarkdownIt
from PIL import Image, ImageDraw, ImageFont

from unlearning.concepts import ERASE, RETAIN, ROLES, SYNONYM
from unlearning.data import openmoji
from unlearning.errors import UserError
from unlearning.reporting.formats import UNITS, decimals, legend, quantity, render_page
from unlearning.reporting.page_images import data_uri, encode, thumbnail
from unlearning.reporting.runs import DRAWINGS, UNEDITED, by_purpose, drawings, metric_names, read_run, settings_text
from unlearning.store.files import read_state, write_atomically
from unlearning.store.images import figure_paths, opened
from unlearning.store.manifest import ManifestRow, read_manifest
from unlearning.store.metrics import Metric

IMAGES, PROMPTS, CONCEPTS = 6, 12, 40  # shown at most: of a prompt, of a concept, of a section
THUMBNAIL = 192  # pixels; larger images are shrunk to it


# --- reading a run ----------------------------------------------------------------------------------------------------


def _read(path: Path, stage: str) -> str:
    """Raises UserError if there is no such file or it is no text; it names the stage that writes it."""
    try:
        return path.read_text()
    except FileNotFoundError:
        raise UserError(f"There is no {path} yet: run the {stage} stage of this run, then report again.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is damaged ({error}): the {stage} stage of this run writes it again.") from None


@dataclass(frozen=True)
class Frame:
    """One prompt and seed.

    Attributes:
        row: The row of the manifest.
        images: By drawing: "base", "erased", and possibly others ("oracle", "attacked-cce").
    """

    row: ManifestRow
    images: Mapping[str, Path]

    @property
    def attack(self) -> str:
        """The name of the attack; "" if there is none."""
        return next((name.removeprefix("attacked-") for name in self.images if name.startswith("attacked-")), "")


def read_frames(run: Path) -> list[Frame]:
    """The images of all manifests. Attacked images stand beside those of the prompt that the attack replaced.

    Raises UserError if base.csv or erased.csv is missing, or they differ in their prompts.
    """
    manifests = drawings(run)
    for name in DRAWINGS:
        _read(run / "images" / f"{name}.csv", "generate")
    base, erased = (read_manifest(manifests.pop(name)) for name in DRAWINGS)
    if [(row.prompt, row.seed) for row in base] != [(row.prompt, row.seed) for row in erased]:
        raise UserError(f"{run / 'images'}: base.csv and erased.csv disagree. Run the generate stage again.")
    frames = [
        Frame(b, {"base": a.path, "erased": b.path} | ({"oracle": b.oracle} if b.oracle else {}))
        for a, b in zip(base, erased, strict=True)
    ]
    attacked = [(name, row) for name, manifest in manifests.items() for row in read_manifest(manifest)]
    return [*frames, *(Frame(row, {**_origin(row, frames), name: row.path}) for name, row in attacked)]


def _origin(row: ManifestRow, frames: Sequence[Frame]) -> Mapping[str, Path]:
    """The images with the same seed of the prompt that an attack replaced. Empty if several prompts are possible."""
    same = [frame for frame in frames if frame.row.role == ERASE and frame.row.seed == row.seed]
    same = [frame for frame in same if frame.row.prompt == row.prompt] or same
    return same[0].images if len(same) == 1 else {}


Sections = dict[str, dict[str, dict[str, list[Frame]]]]


def sections(frames: Sequence[Frame]) -> Sections:
    """Frames by role, concept and prompt.

    The concept is the label that tells erased from retained prompts, or else the erased concept of the row. For an
    attack it is the attack's name.
    """
    labels = {role: [frame.row.labels for frame in frames if frame.row.role == role] for role in (ERASE, RETAIN)}
    answers = {role: {(q, a) for row in labels[role] for q, a in row.items()} for role in labels}
    common = {question for question, _ in answers[ERASE] & answers[RETAIN]}
    question = next((q for row in labels[ERASE] for q in row if q not in common), None)
    grouped: Sections = {role: {} for role in ROLES}
    for frame in frames:
        concepts = grouped.setdefault(frame.row.role, {})
        label = frame.row.labels.get(question) if question else None
        prompts = concepts.setdefault(frame.attack or label or frame.row.concept, {})
        prompts.setdefault(frame.row.prompt, []).append(frame)
    return {role: concepts for role, concepts in grouped.items() if concepts}


def latent_differences(run: Path, rows: Iterable[ManifestRow]) -> dict | None:
    """D(p) and w of every prompt (UnGuide's guidance), the threshold, and D of the empty prompt.

    {"threshold": 3.4, "empty": 1.2, "prompts": [{"prompt": "a photo of the cat", "role": "erase", "D": 5.1, "w": -1.0},
    ...]}, the largest D first; None if the images were made by another guidance.
    """
    decided = {row.prompt: row for row in rows if "D" in row.decided}
    guidance = _with_threshold(read_state(run / "erasure" / "erasure.json", dict)) if decided else None
    if guidance is None:
        return None
    prompts = [{"prompt": row.prompt, "role": row.role, **row.decided} for row in decided.values()]
    ranked = sorted(prompts, key=lambda prompt: -prompt["D"])
    return {"threshold": guidance["threshold"], "empty": guidance["empty"], "prompts": ranked}


def _with_threshold(settings: object) -> dict | None:
    """The settings of the guidance, wherever it is in a composed erasure."""
    if isinstance(settings, dict) and settings.keys() >= {"threshold", "empty"}:
        return settings
    parts = settings.values() if isinstance(settings, dict) else settings if isinstance(settings, list) else ()
    return next((named for part in parts if (named := _with_threshold(part))), None)


# --- the page ---------------------------------------------------------------------------------------------------------


def _show(name: str, metric: Metric, number: float | None, sign: str = "") -> str:
    """A number of the metric, with its unit or as many decimals as its values need; `sign` is "+" for a change."""
    if number is None:
        return "–"
    if name in UNITS and not sign:
        return quantity(name, number)
    places = decimals(value for value in (metric.value, metric.base) if value is not None)
    return f"{number:{sign},.{places}f}".replace("-", "−")


def _markdown(text: str) -> str:
    """HTML of a README, without its front matter. HTML in it is escaped, and its images are not loaded."""
    text = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    return MarkdownIt("commonmark", {"html": False}).enable("table").disable("image").render(text)


def _title(settings: Mapping[str, object]) -> str:
    concept = settings.get("concept") or settings.get("dataset") or "a concept"
    method = settings.get("method")
    return f"{concept}, nothing erased" if method == UNEDITED else f"{concept}, erased by {method}"


def _third(metrics: Iterable[str]) -> str:
    """The caption of the third column of images, which is that of the drawing "oracle"."""
    if any(name.endswith("_word_removed") for name in metrics):
        return "the unedited model, given the prompt without the concept's words"
    return "the model that never knew the concept"


def _command(run: Path) -> str:
    """The command line of the whole run, even if the last command was only for some of its stages."""
    overrides = yaml.safe_load(_read(run / ".hydra" / "overrides.yaml", "fit")) or []
    return shlex.join(["unlearn", *(o for o in overrides if not o.startswith("stages="))])


def report(run: Path) -> Path:
    """Writes `run`/report.html from what the other stages left in `run`. Returns its path.

    An image without a file is shown as missing. Raises UserError if a stage has not run.
    """
    finished, frames = read_run(run), read_frames(run)
    differences = latent_differences(run, (frame.row for frame in frames if not frame.attack))
    if differences:
        write_atomically(run / "latent_differences.json", json.dumps(differences, indent=2))
    names = metric_names([finished])
    protocols = dict.fromkeys(protocol for name in names if (protocol := finished.metrics[name].protocol))
    page = render_page(
        "run_page.html.j2",
        title=_title(finished.settings),
        settings=finished.settings,
        metrics=finished.metrics,
        purposes=by_purpose(names),
        show=_show,
        protocols=[*protocols],
        legend=legend(names),
        sections=sections(frames),
        third=_third(names) if any("oracle" in frame.images for frame in frames) else "",
        differences=differences,
        figures={caption: data_uri(path.read_bytes()) for caption, path in figure_paths(run).items()},
        image=lambda path: thumbnail(path, THUMBNAIL),
        limit={"images": IMAGES, "prompts": PROMPTS, "concepts": CONCEPTS},
        command=_command(run),
        config=settings_text(run),
        readme=_markdown(_read(run / "erasure" / "README.md", "fit")),
        licence=openmoji.LICENCE if str(finished["model"]).startswith("emoji") else "",
    )
    write_atomically(run / "report.html", page)
    return run / "report.html"


# --- the strip --------------------------------------------------------------------------------------------------------

_TILE, _GAP, _SPACE, _MARGIN, _SIDE, _HEAD, _FOOT = 192, 12, 44, 36, 108, 58, 84  # pixels; shown at half the size
_INK, _SOFT, _PAPER = "#1d1d1f", "#77747c", "#ffffff"
_HEADINGS = {ERASE: "erased", SYNONYM: "synonyms", RETAIN: "retained"}


def teaser(run: Path, out: Path, columns: int = 8) -> None:
    """Writes `out`, a PNG strip: the base model's images in the top row, the erased model's in the bottom row.

    The columns are shared among the erased concept, its synonyms and retained concepts; the first images of each prompt
    come first. Raises UserError if an image is missing.
    """
    grouped = sections([frame for frame in read_frames(run) if not frame.attack])
    shown = _share({role: grouped[role] for role in ROLES if role in grouped}, columns)
    count = sum(map(len, shown.values()))
    width = 2 * _MARGIN + _SIDE + count * (_TILE + _GAP) - _GAP + (len(shown) - 1) * (_SPACE - _GAP)
    strip = Image.new("RGB", (width, 2 * _MARGIN + _HEAD + 2 * _TILE + _GAP + _FOOT), _PAPER)
    pen, font, small = ImageDraw.Draw(strip), ImageFont.load_default(26), ImageFont.load_default(22)
    corners = _corners()
    tops = {"base": _MARGIN + _HEAD, "erased": _MARGIN + _HEAD + _TILE + _GAP}
    for top, word in zip(tops.values(), ("before", "after"), strict=True):
        pen.text((_MARGIN, top + _TILE / 2), word, _SOFT, font, anchor="lm")
    x = _MARGIN + _SIDE
    for role, frames in shown.items():
        right = x + len(frames) * (_TILE + _GAP) - _GAP
        pen.text((x, _MARGIN), _HEADINGS[role], _INK, font, anchor="la")
        pen.line((x, _MARGIN + _HEAD - 16, right, _MARGIN + _HEAD - 16), "#d9d6d0", 2)
        for frame in frames:
            for drawing, top in tops.items():
                strip.paste(_tile(frame.images[drawing]), (x, top), corners)
            caption = textwrap.fill(frame.row.prompt, 18, max_lines=3, placeholder="...")
            pen.multiline_text((x + _TILE / 2, tops["erased"] + _TILE + 14), caption, _SOFT, small, "ma", 6, "center")
            x += _TILE + _GAP
        x += _SPACE - _GAP
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, encode(strip, compress_level=2))  # a third of the time, for an eighth more bytes


def _share(grouped: Sections, columns: int) -> dict[str, list[Frame]]:
    """`columns` frames, from the roles in turn. In a role, concepts vary before prompts, and prompts before seeds."""
    waiting = {}
    for role, concepts in grouped.items():
        ranked = [
            (seed, prompt, frame)
            for prompts in concepts.values()
            for prompt, frames in enumerate(prompts.values())
            for seed, frame in enumerate(frames)
        ]
        waiting[role] = [frame for *_, frame in sorted(ranked, key=lambda item: item[:2])]
    turns = [role for i in range(columns) for role in waiting if i < len(waiting[role])][:columns]
    return {role: waiting[role][: turns.count(role)] for role in dict.fromkeys(turns)}


def _tile(path: Path) -> Image.Image:
    if not path.exists():
        raise UserError(f"The image {path} is missing: run the generate stage of this run again.")
    with opened(path) as image:
        return image.convert("RGB").resize((_TILE, _TILE), Image.Resampling.LANCZOS)


def _corners() -> Image.Image:
    """A mask that rounds the corners of a tile, drawn larger and shrunk for smooth edges."""
    mask = Image.new("L", (4 * _TILE, 4 * _TILE))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, 4 * _TILE - 1, 4 * _TILE - 1), 4 * 14, 255)
    return mask.resize((_TILE, _TILE), Image.Resampling.LANCZOS)

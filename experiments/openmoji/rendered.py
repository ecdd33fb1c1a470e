"""Training images of the embedded models, rendered once and saved, so that training does not wait for rendering."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from multiprocessing import Pool
from pathlib import Path

import numpy as np
from tqdm import tqdm

from unlearning.config.naming import slug
from unlearning.data import openmoji
from unlearning.data.captioning import Content

ROOT = Path(__file__).parents[2] / "outputs" / "openmoji"
WEIGHTS = ROOT.parents[1] / "unlearning" / "weights"


def trained(own: str, shipped: str) -> Path:
    """The folder of a part that was trained here, below ROOT, or else of the one that the package ships."""
    return ROOT / own if (ROOT / own / "config.json").exists() else WEIGHTS / shipped


def without_suffix(concepts: Sequence[str]) -> str:
    """What the names of models end with that never saw the concepts: "_without_cat"."""
    return f"_without_{slug(concepts)}" if concepts else ""


def _draw(job: tuple[str, int, int], **shares: float) -> tuple[np.ndarray, dict]:
    picture = openmoji.sample(*job, **shares)
    return picture.image, asdict(Content.of(picture))


def _draw_nothing(job: tuple[str, int, int]) -> tuple[np.ndarray, dict]:
    return openmoji.unrecognisable(openmoji.rng_of(*job)), asdict(Content((), "", (), ""))


def rendered(
    split: str, count: int, seed: int = 0, nothing: bool = False, **shares: float
) -> tuple[np.ndarray, list[Content]]:
    """`count` images (N, 64, 64, 3) uint8, memory-mapped, and the content of each; images of nothing with `nothing`.

    `shares` are arguments of openmoji.sample: the shares of scenes and of images in plain colour.
    """
    name = "-".join([split, str(seed), str(count), *(f"{v:g}-{k}" for k, v in shares.items())])
    name += "-nothing" if nothing else ""
    images, labels = ROOT / f"{name}.npy", ROOT / f"{name}.json"
    if not labels.exists():
        ROOT.mkdir(parents=True, exist_ok=True)
        unfinished = images.with_suffix(".partial.npy")
        array = np.lib.format.open_memmap(unfinished, "w+", np.uint8, (count, openmoji.SIZE, openmoji.SIZE, 3))
        rows = []
        with Pool(os.cpu_count()) as pool:
            jobs = ((split, seed, i) for i in range(count))
            drawn = pool.imap(_draw_nothing if nothing else partial(_draw, **shares), jobs, 64)
            for i, (image, row) in enumerate(tqdm(drawn, f"drawing {split}", count)):
                array[i] = image
                rows.append(row)
        array.flush()
        unfinished.rename(images)
        labels.with_suffix(".partial").write_text(json.dumps(rows))
        labels.with_suffix(".partial").rename(labels)
    rows = json.loads(labels.read_text())
    contents = [Content(tuple(r["objects"]), r["style"], tuple(map(tuple, r["places"])), r["background"]) for r in rows]
    return np.load(images, mmap_mode="r"), contents


def without(concepts: Sequence[str], contents: list[Content]) -> np.ndarray:
    """The places of the contents that show none of the concepts, which are names of objects or of styles."""
    kept = [i for i, c in enumerate(contents) if not {*c.objects, c.style} & {*concepts}]
    return np.array(kept)


def loads_as_float32(config: Path) -> None:
    """Makes transformers load half-precision weights as float32, as diffusers does."""
    _edit(config, lambda settings: {**settings, "dtype": "float32"})


def names_no_folder(config: Path) -> None:
    """Removes the local path that the part was loaded from."""
    _edit(config, lambda settings: {k: v for k, v in settings.items() if k != "_name_or_path"})


def _edit(config: Path, change: Callable[[dict], dict]) -> None:
    config.write_text(json.dumps(change(json.loads(config.read_text())), indent=2) + "\n")

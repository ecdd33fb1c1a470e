"""A cache of evaluations in the store: an evaluator is not run twice on the same images."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from unlearning.errors import UserError
from unlearning.store.files import digest, read_state, write_atomically
from unlearning.store.manifest import ManifestRow, batches, load_images


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluator on one set of images.

    Args:
        values: Numbers by metric name.
        protocol: How they were measured.
        made_by: The code that measured them; None if that is not known.
        details: What the evaluator says about each image, a JSON object each.
    """

    values: Mapping[str, float]
    protocol: str
    made_by: Mapping | None = None
    details: Sequence[dict] = field(default_factory=tuple)


def evaluation(
    store: Path, about: str, rows: Sequence[ManifestRow], evaluator, batch_size: int, code: Mapping, label: str
):
    """The evaluation of a manifest's images, from the store if another run has already computed it.

    An evaluation that failed on an image is not stored, because it may succeed the next time.

    Args:
        about: What the run erases; evaluators may depend on it.
        evaluator: An evaluators.base.Evaluator, after `prepare`.
        batch_size: Images in memory at once.
        code: The version of the code, which is stored with the numbers.
        label: Names the evaluator and the images in messages and in the progress bar.

    Raises:
        UserError: If there are no images, or a number is not finite.
    """
    if not rows or batch_size < 1:
        raise UserError(f"{label}: there are no images to measure ({len(rows)}, sampler.batch_size={batch_size}).")
    content = [
        (
            [p and p.parts[-2:] for p in (row.path, row.base, row.source)],
            *([row.oracle.parts[-2:]] if row.oracle else []),
            *(row.role, row.concept, row.labels, row.regions),
        )
        for row in rows
    ]
    evaluator.reset()
    path = store / "evaluations" / f"{digest(about, content, evaluator.protocol, evaluator.version)}.json"
    if stored := read_state(path, lambda kept: _restored(kept, path.with_suffix(".jsonl"))):
        return stored
    with tqdm(total=len(rows), desc=label, unit="image", leave=False) as bar:
        for batch in batches(rows, batch_size):
            evaluator.update(load_images(batch), batch)
            bar.update(len(batch))
    values = evaluator.compute()
    for key, value in values.items():
        if not math.isfinite(value):
            raise UserError(f"{label}: {key} is {value}. Look at the images in {rows[0].path.parent}.")
    made = Evaluation(values, evaluator.protocol, code, list(evaluator.details))
    if not evaluator.failed:
        path.parent.mkdir(parents=True, exist_ok=True)
        if made.details:
            write_atomically(path.with_suffix(".jsonl"), lines(made.details))
        kept = {"values": dict(made.values), "protocol": made.protocol, "made by": made.made_by}
        write_atomically(path, json.dumps(kept, indent=2))
    return made


def lines(details: Sequence[dict]) -> str:
    """A JSON object in each line."""
    return "".join(json.dumps(one) + "\n" for one in details)


def _restored(kept: Mapping, details: Path) -> Evaluation:
    """Raises ValueError, KeyError or TypeError if the files are not those of an evaluation."""
    values = dict(kept["values"])
    if not all(map(math.isfinite, values.values())):
        raise ValueError("a number is not finite")
    stated = [json.loads(line) for line in details.read_text().splitlines()] if details.exists() else []
    return Evaluation(values, kept["protocol"], kept.get("made by"), stated)

"""The sets of images that a run compares, and their manifests.

"base" are images by the base model, "erased" by the erased one, "attacked-NAME" by the erased one with the result of an
attack. "oracle" are images by the model that evaluators compare with; they have no manifest, but the rows of base and
erased name them.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from unlearning.concepts import ERASE
from unlearning.erasures.base import Erasure
from unlearning.erasures.composed import composed
from unlearning.errors import UserError
from unlearning.models.base import Model
from unlearning.sampling.attack_result import attacked
from unlearning.sampling.reconstruction import Reconstruction
from unlearning.sampling.sampler import Sampler
from unlearning.store.files import digest, read_state, write_atomically
from unlearning.store.manifest import ManifestRow, link_outputs, read_manifest, with_decided, write_manifest

BASE, ERASED, ORACLE, ATTACKED = "base", "erased", "oracle", "attacked-"
Rows = Mapping[str, Sequence[ManifestRow]]  # by the drawing's name


@dataclass(frozen=True)
class Drawing:
    """A set of images that a run compares: what is applied to the model, and what is generated with it.

    Args:
        name: "base", "erased", "oracle" or "attacked-NAME"; the manifest is images/NAME.csv.
        erasures: Applied to the model, in this order.
        sampler: Draws it.
        attack: The folder of an attack's result; None for the task's own prompts.
    """

    name: str
    erasures: tuple[Erasure, ...]
    sampler: Sampler | Reconstruction
    attack: Path | None = None

    def place(self, store: Path, model: Model, precision: object) -> Path:
        """The folder of its images in the store: a digest of model, precision, erasures and sampler."""
        edits = [erasure.digest for erasure in self.erasures if not erasure.empty]
        key = digest(model.fingerprint, (model.numerics, precision), edits, self.sampler.protocol)
        return store / "images" / key

    def rows(self, place: Path, requested: Sequence[ManifestRow], others: Rows) -> list[ManifestRow]:
        """Its rows. The base of an image is the unedited model's; of an attacked one, the erased model's.

        Args:
            place: The folder of its images.
            requested: The images that the task asks for, in any folder.
            others: The rows of the drawings before it.
        """
        rows = [replace(row, path=place / row.path.name) for row in requested]
        pairs = zip(rows, others.get(ERASED if self.attack else BASE, rows), strict=True)
        if self.attack:
            before = [replace(row, base=own.path) for row, own in pairs if row.role == ERASE]
            return attacked(self.attack, before)
        return [row if row.path == own.path else replace(row, base=own.path) for row, own in pairs]


def applied(erasures: Sequence[Erasure], model: Model) -> AbstractContextManager:
    """A context in which all of the erasures are applied; of none, the model is the unedited one."""
    return composed(*erasures).applied_to(model) if erasures else nullcontext()


def write_manifests(folder: Path, rows: Rows) -> None:
    """Writes a manifest of each drawing's images that exist, and counts those that do not.

    An image that base or erased model fails on is left out of both manifests: it is neither erased nor retained.

    Args:
        folder: The run's images/.

    Raises:
        UserError: If no image exists.
    """
    pairs = [(a, b) for a, b in zip(rows[BASE], rows[ERASED], strict=True) if a.path.exists() and b.path.exists()]
    if not pairs:
        raise UserError("No image could be generated; the warnings above say why.")
    kept = {name: [row for row in some if row.path.exists()] for name, some in rows.items()}
    oracle = {row.path.name: row.path for row in kept.get(ORACLE, ())}
    kept[BASE], kept[ERASED] = (
        [replace(row, oracle=oracle.get(row.path.name)) for row in side] for side in zip(*pairs, strict=True)
    )
    failures = sum(len(rows[name]) - len(kept[name]) for name in rows if name != ERASED)
    kept.pop(ORACLE, None)
    for old in folder.glob(f"{ATTACKED}*.csv"):
        if old.stem not in kept:
            old.unlink()
    for name, some in kept.items():
        write_manifest(folder / f"{name}.csv", map(with_decided, some))
        link_outputs(folder / name, [row for row in some if row.source])
    count = folder / "failed"
    write_atomically(count, str(failures)) if failures else count.unlink(missing_ok=True)


def failed(folder: Path) -> int:
    """How many images could not be generated, of those whose manifests are in `folder`."""
    return read_state(folder / "failed", int) or 0


def read_manifests(
    folder: Path, requested: Sequence[ManifestRow], attacks: Iterable[str] = ()
) -> dict[str, list[ManifestRow]]:
    """The manifests of base, erased, and the attacks.

    Args:
        folder: The run's images/.
        requested: The images that the task asks for.

    Raises:
        UserError: If a manifest is missing, base or erased does not list these images, or an attack's does not list
            those of the erased concepts.
    """
    attacked_in = {f"{ATTACKED}{attack}": folder.parent / "attacks" / f"{attack}.json" for attack in attacks}
    manifests = {name: _read(folder / f"{name}.csv") for name in (BASE, ERASED, *attacked_in)}
    base, erased = ([row.path.name for row in manifests[name]] for name in (BASE, ERASED))
    wanted, lost = Counter(row.path.name for row in requested), failed(folder)
    if base != erased or _differ(Counter(base), wanted, lost):
        raise UserError(
            f"The manifests in {folder} do not list the images that the settings ask for: "
            f"{len(base)} of the base model, {len(erased)} of the erased one, {wanted.total()} asked for. "
            "The generate stage writes them again."
        )
    for name, record in attacked_in.items():
        targets = Counter(row.path.name for row in _targets(record, requested))
        listed = Counter(row.base.name for row in manifests[name] if row.base)
        if _differ(listed, targets, lost):
            raise UserError(
                f"{folder / name}.csv lists {listed.total()} images of the {targets.total()} that were attacked. The "
                "generate stage writes it again."
            )
    return manifests


def _targets(record: Path, requested: Iterable[ManifestRow]) -> list[ManifestRow]:
    """The requested images that an attack has a result for, by the record in the run's attacks/."""

    def targets(saved: Mapping) -> set[tuple[str, int | None]]:
        return {(row["target"], row.get("seed")) for row in saved["rows"]}

    known = read_state(record, targets) or set()
    own = [row for row in requested if row.role == ERASE]
    return [row for row in own if known & {(row.prompt, row.seed), (row.prompt, None)}]


def _differ(listed: Counter, wanted: Counter, lost: int) -> bool:
    """Whether images are listed that were not wanted, or more are missing than could not be generated."""
    return bool(listed - wanted) or (wanted - listed).total() > lost


def _read(path: Path) -> list[ManifestRow]:
    if not path.exists():
        raise UserError(f"There is no {path}: run the generate stage first.")
    return read_manifest(path)

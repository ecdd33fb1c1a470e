"""The erasure in a run's folder: unfinished, saved, or copied from a run with the same erasure."""

import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from unlearning.erasures.base import Erasure
from unlearning.errors import UserError
from unlearning.models.base import Model
from unlearning.store.files import set_aside, write_atomically
from unlearning.store.images import FIGURES, write_figures
from unlearning.tracking import cost

log = logging.getLogger(__name__)
FOLDER, KEY, PARTIAL = "erasure", ".fit", ".erasure.partial"  # in the run's folder


@dataclass(frozen=True)
class KeptErasure:
    """The erasure of one run.

    Args:
        run: The run's folder.
        key: A digest of all that the erasure depends on (stages/keys.py).
    """

    run: Path
    key: str

    @property
    def folder(self) -> Path:
        """The folder of the saved erasure."""
        return self.run / FOLDER

    @property
    def checkpoints(self) -> Path:
        """The folder of what an interrupted fit resumes from."""
        return self.run / "checkpoints"

    @property
    def cost(self) -> Path:
        """The file of the run's costs."""
        return self.run / "cost.json"

    def is_there(self) -> bool:
        """Whether the erasure is there; it is copied from another run that has it."""
        if self.is_finished():
            return True
        if twin := self.twin():
            self.take(twin)
        return twin is not None

    def is_finished(self) -> bool:
        """Whether the erasure exists. Removes a damaged erasure, and one that was fitted under another key."""
        begun = self.run / KEY
        if not begun.exists() or begun.read_bytes() != self.key.encode():
            for old in (self.folder, self.checkpoints, self.run / FIGURES):
                if old.exists():
                    shutil.rmtree(old)  # not ignore_errors: a file that stays would be taken for the new erasure
            cost.forget(self.cost, "fit")
            write_atomically(begun, self.key)
        if not self.folder.exists():
            return False
        try:
            Erasure.base_of(self.folder)
            return True
        except UserError:
            set_aside(self.folder, "its erasure.json is missing or cannot be read")
            cost.forget(self.cost, "fit")
            return False

    def twin(self) -> Path | None:
        """The folder of another run whose erasure has the same key: the two differ only in what they measure."""
        for begun in sorted(self.run.parent.glob(f"*/{KEY}")):
            other = begun.parent
            try:
                if other != self.run and begun.read_bytes() == self.key.encode() and (other / FOLDER).exists():
                    Erasure.load(other / FOLDER)
                    return other
            except (OSError, UserError) as error:
                log.warning("the erasure of %s is not taken: %s", other, error)
        return None

    def take(self, twin: Path) -> None:
        """Copies the erasure of another run, its figures and its costs."""
        log.info("the erasure is that of %s", twin)
        if (twin / FIGURES).exists():
            shutil.copytree(twin / FIGURES, self.run / FIGURES, dirs_exist_ok=True)
        cost.take(twin / "cost.json", self.cost, "fit")
        unfinished = self.run / PARTIAL
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(twin / FOLDER, unfinished)
        unfinished.rename(self.folder)
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def save(self, erasure: Erasure, *, title: str, base: Model, figures: Mapping[str, Image.Image]) -> None:
        """Writes the erasure atomically, and the figures of its fit. Then deletes the checkpoints."""
        unfinished = self.run / PARTIAL
        try:
            erasure.save(unfinished, title=title, base=base)
            write_figures(self.run, figures)
            unfinished.rename(self.folder)
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)
        shutil.rmtree(self.checkpoints, ignore_errors=True)


def loaded(folder: Path, model: Model) -> Erasure:
    """The erasure in a folder. Raises UserError if it was made from another model."""
    if Erasure.base_of(folder) != model.fingerprint:
        raise UserError(
            f"The erasure in {folder} was made from another model than {model.name}. Delete the folder to "
            "make it again, or choose the model that it belongs to."
        )
    return Erasure.load(folder)

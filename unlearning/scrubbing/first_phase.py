"""The result of the scrubber's first phase, cached beside the checkpoints for an interrupted fit."""

# N images, C H W latent shape.
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor

from unlearning.models.conditioning import Conditioning
from unlearning.scrubbing.conditioning import ConditioningRows
from unlearning.scrubbing.prototypes import Prototypes
from unlearning.store.files import write_atomically
from unlearning.store.loops import kept_in
from unlearning.training.checkpoints import folder_of, is_whole

FILE, SEARCH = "first_phase.pt", "first_phase"  # the result; the state of an unfinished search


@dataclass(frozen=True)
class FirstPhase:
    """The inputs of the second phase.

    Args:
        prototypes: The prototypes of the concept.
        rows: The student's conditioning.
        M: Masks of the concept in the forget images, (N, 1, H, W).
        eta: The content that replaces the concept in the teacher's images, (N, C, H, W).
    """

    prototypes: Prototypes
    rows: ConditioningRows
    M: Tensor
    eta: Tensor

    def save(self, path: Path) -> None:
        """Writes the result to a file, with tensors and plain values only."""
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = io.BytesIO()
        torch.save(asdict(self), buffer)
        write_atomically(path, buffer.getvalue())

    @staticmethod
    def load(path: Path, device: torch.device) -> "FirstPhase":
        """Reads what `save` wrote."""
        parts = torch.load(path, map_location=device, weights_only=True)
        saved = parts.pop("rows")
        null, forget, retain = (Conditioning(**saved[name]) for name in ("null", "forget", "retain"))
        rows = ConditioningRows(null, forget, retain, saved["words"], saved["others"])
        return FirstPhase(Prototypes(**parts.pop("prototypes")), rows, **parts)


def cached(search: Callable[[], FirstPhase], trainer: pl.Trainer, device: torch.device) -> FirstPhase:
    """The cached result of `search`, or a new one, which is then cached if the trainer keeps checkpoints.

    An interrupted search for words is resumed. A damaged file is set aside.

    In a distributed fit, all processes search, and all use the result of the first process.
    """
    folder = folder_of(trainer)
    if not folder:
        return search()
    path = folder / FILE
    if trainer.strategy.broadcast(trainer.is_global_zero and not is_whole(path)):
        with kept_in(folder / f"{SEARCH}-{trainer.global_rank}"):
            result = search()
            if trainer.is_global_zero:
                result.save(path)
        trainer.strategy.barrier()
    return FirstPhase.load(path, device)

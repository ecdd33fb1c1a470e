"""What the scrubber's first phase comes to, kept beside the checkpoints: a fit that was interrupted goes on from it."""

# N pictures, C H W latent shape.
import io
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch import Tensor

from unlearning.models.diffusion import Conditioning
from unlearning.scrubbing.conditioning import Told
from unlearning.scrubbing.fingerprint import Fingerprint
from unlearning.store.files import write_atomically
from unlearning.training.checkpoints import folder_of


@dataclass(frozen=True)
class Found:
    """
    Args:
        M: Where in the forget images the concept is, (N, 1, H, W).
        eta: What is put in its place, (N, C, H, W).
    """

    fingerprint: Fingerprint
    told: Told
    M: Tensor
    eta: Tensor

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        written = io.BytesIO()
        torch.save(asdict(self), written)
        write_atomically(path, written.getvalue())

    @staticmethod
    def load(path: Path, device: torch.device) -> "Found":
        parts = torch.load(path, map_location=device, weights_only=True)
        told = {k: Conditioning(**v) if isinstance(v, dict) else v for k, v in parts.pop("told").items()}
        return Found(Fingerprint(**parts.pop("fingerprint")), Told(**told), **parts)


def once(search: Callable[[], Found], trainer: pl.Trainer, device: torch.device) -> Found:
    """What `search` finds, where checkpoints are kept the first time alone: a fit that was interrupted reads it.

    All processes of a distributed fit search, side by side, and go on from what the first has found.
    """
    folder = folder_of(trainer)
    if not folder:
        return search()
    path = folder / "first_phase.pt"
    if trainer.strategy.broadcast(not path.exists()):
        found = search()
        if trainer.is_global_zero:
            found.save(path)
        trainer.strategy.barrier()
    return Found.load(path, device)

"""A run that takes seconds, and helpers that inspect its folder."""

import os
import signal
from pathlib import Path

from unlearning.sampling.sampler import Sampler

STEPS = 2  # of a picture
FIT = 3  # denoiser evaluations of an iteration of ESD, left where its trajectory begins: student, and teacher twice
EXACT = ["method.trajectory=exact", "method.batch_size=1", "method.steps=1"]
TRAIN = ["method=esd_x", *EXACT, "trainer.callbacks.0.every_n_train_steps=2"]
SMALL = ["dataset=prompt", "dataset.others=[dog,sky]"]  # three prompts


def image_evaluations(count: int) -> int:
    """The number of denoiser evaluations for `count` guided images."""
    return count * STEPS * 2


def at_call(monkeypatch, owner: type, name: str, k: int, happen) -> None:
    """Calls `happen()` instead of the k-th call, from 1, of owner.name."""
    original, calls = getattr(owner, name), [0]

    def call(*arguments, **keywords):
        calls[0] += 1
        return happen() if calls[0] == k else original(*arguments, **keywords)

    monkeypatch.setattr(owner, name, call)


def no_dog_can_be_drawn(monkeypatch) -> None:
    """Images of dogs become NaN."""
    draw = Sampler.draw

    def overflows(self, model, rows):
        images, decisions = draw(self, model, rows)
        images[[i for i, row in enumerate(rows) if "dog" in row.prompt]] = float("nan")
        return images, decisions

    monkeypatch.setattr(Sampler, "draw", overflows)


def ctrl_c() -> None:
    signal.raise_signal(signal.SIGINT)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def files(folder: Path) -> dict[str, int]:
    """Every file below a folder with the time it was last written."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def image_files(store: Path) -> dict[str, int]:
    """The image files among them."""
    return {name: time for name, time in files(store).items() if name.endswith(".png")}


def partial(folder: Path) -> list[str]:
    return [str(p) for p in folder.rglob("*partial*")]

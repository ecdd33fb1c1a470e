"""Training data as a function of the step, so that a resumed training sees the same batches."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import pytorch_lightning as pl


def seed_of(*place: int) -> int:
    """A seed derived from non-negative integers, such as a step. Seeds of neighbouring integers are unrelated."""
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0])


class Batches(pl.LightningDataModule):
    """An infinite sequence of batches, in which the k-th batch is always the same. Each of n processes gets every n-th.

    Subclasses implement `batch`.
    """

    @abstractmethod
    def batch(self, k: int):
        """The k-th batch, counted from 0."""

    def train_dataloader(self) -> Iterable:
        """The batches from the Trainer's current step on. They do not end; the Trainer stops at its max_steps."""
        trainer = self.trainer
        first = trainer.global_step * trainer.accumulate_grad_batches * trainer.world_size + trainer.global_rank
        return _Endless(self.batch, first, trainer.world_size)


@dataclass(frozen=True)
class _Endless(Iterable):
    batch: Callable[[int], object]
    first: int
    stride: int

    def __iter__(self) -> Iterator:
        return map(self.batch, count(self.first, self.stride))


class Prompts(Batches):
    """Batches of `batch_size` prompts, which take turns."""

    def __init__(self, prompts: list[str], batch_size: int):
        super().__init__()
        self.prompts, self.batch_size = prompts, batch_size

    def batch(self, k: int) -> list[str]:
        return [self.prompts[i % len(self.prompts)] for i in range(k * self.batch_size, (k + 1) * self.batch_size)]

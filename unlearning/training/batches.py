"""What a training learns from, step by step: a function of the step, so that an interruption changes nothing."""

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import count

import numpy as np
import pytorch_lightning as pl


def seed_of(*place: int) -> int:
    """A seed for a place in a training, where neighbours have nothing in common; of numbers from 0."""
    return int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0])


class Batches(pl.LightningDataModule):
    """Batches without end, of which the k-th is always the same. Of n processes each has every n-th.

    Subclasses write `batch`.
    """

    @abstractmethod
    def batch(self, k: int):
        """The k-th, from 0."""

    def train_dataloader(self) -> Iterable:
        """From the step on at which the Trainer is; its max_steps is the only clock."""
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
    """Prompts in turn, `batch_size` at a time."""

    def __init__(self, prompts: list[str], batch_size: int):
        super().__init__()
        self.prompts, self.batch_size = prompts, batch_size

    def batch(self, k: int) -> list[str]:
        return [self.prompts[i % len(self.prompts)] for i in range(k * self.batch_size, (k + 1) * self.batch_size)]

"""The contract: `fit(model, task) -> erasure`, and the model is left bit-identical.

How an erasure is found is the method's own business: it descends a loss (TrainedMethod), solves, counts, or does
nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from unlearning.concepts import UnlearningTask
from unlearning.erasures.base import Erasure
from unlearning.errors import UserError
from unlearning.models.base import Model
from unlearning.models.diffusion import DiffusionModel
from unlearning.training.batches import Batches, Prompts, seed_of
from unlearning.training.student import LoRA, Weights


class Method(ABC):
    """A method's constructor stores hyperparameters, and nothing else.

    Attributes:
        works_on: The class of models it knows how to edit; anything else is refused before a weight is loaded.
        figures: What the last fit saw, by caption; the run keeps them and the report shows them.
    """

    works_on: type[Model] = DiffusionModel
    figures: Mapping[str, Image.Image] = MappingProxyType({})

    @abstractmethod
    def fit(self, model: Model, task: UnlearningTask) -> Erasure: ...


class TrainedMethod(Method, pl.LightningModule):
    """A method that descends a loss.

    Subclasses write `loss`, in their paper's notation, with `self.student` (the model as it is being trained) and
    `self.teacher` (the model as it was; what does not move the two share in memory).

    Args:
        student: What moves: some of the denoiser's own weights, or an adapter (methods/student.py).
        optimizer: Makes an optimizer of a list of parameters.
        scheduler: Makes a schedule of the learning rate, stepped at every iteration, of an optimizer; None for none.
        trainer: Makes the Lightning Trainer, given max_steps.
        iterations: Steps of the optimizer.
        batch_size: Prompts of the erased concepts in a step, or pictures, for a method that learns from those.
    """

    def __init__(
        self,
        *,
        student: Weights | LoRA,
        optimizer: Callable,
        trainer: Callable,
        iterations: int,
        batch_size: int = 1,
        scheduler: Callable | None = None,
    ):
        super().__init__()
        self.kind_of_student, self.iterations, self.batch_size = student, iterations, batch_size
        self._optimizer, self._scheduler, self._make_trainer = optimizer, scheduler, trainer

    @abstractmethod
    def loss(self, batch) -> Tensor:
        """The objective () on a batch of `data`."""

    def data(self) -> Batches:
        """What is learned from, when student, teacher and task are there; by default prompts of the erased concepts."""
        return Prompts([self.task.prompt(concept.name) for concept in self.task.erase], self.batch_size)

    def fit(self, model: DiffusionModel, task: UnlearningTask) -> Erasure:
        if model.autocast == torch.float16:
            raise UserError(
                "Most gradients are too small for float16 to tell from nothing: model.autocast=bfloat16, or "
                "trainer.precision=16-mixed, which scales them."
            )
        self.task, self.seed = task, torch.initial_seed()
        with self.kind_of_student.of(model) as lesson:
            self.student, self.teacher = lesson.student, lesson.teacher
            # Registered under names without dots: DDP averages their gradients, checkpoints hold them and nothing else.
            self.weights = nn.ParameterDict({n.replace(".", "/"): p for n, p in lesson.parameters.items()})
            try:
                trainer = self._make_trainer(max_steps=self.iterations)
                if trainer.precision in ("16-true", "bf16-true"):
                    raise UserError(
                        f"trainer.precision={trainer.precision} would round a training's small steps away: "
                        f"trainer.precision={trainer.precision.replace('true', 'mixed')}."
                    )
                trainer.fit(self, datamodule=self.data(), ckpt_path=_last_checkpoint(trainer))
                return lesson.erasure()
            finally:
                del self.student, self.teacher, self.task, self.weights

    def training_step(self, batch, batch_idx: int) -> Tensor:
        # Noise, too, is a function of the step, and each process has its own.
        place = (self.seed, self.global_rank, self.global_step, batch_idx % self.trainer.accumulate_grad_batches)
        torch.manual_seed(seed_of(*place))
        loss = self.loss(batch)
        self._insist(torch.isfinite(loss), f"The loss is {loss.item()} at step {self.global_step}.")
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def optimizer_step(self, *args, **kwargs) -> None:
        step = self.global_step
        super().optimizer_step(*args, **kwargs)
        finite = all(torch.isfinite(p).all() for p in self.weights.values())
        self._insist(finite, f"The weights are not finite at step {step + 1}.")  # said before a checkpoint keeps them

    @staticmethod
    def _insist(finite: bool | Tensor, otherwise: str) -> None:
        if not finite:
            raise UserError(
                f"{otherwise} The last checkpoint, if there is one, holds finite weights; a smaller "
                "method.optimizer.lr usually helps."
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self._optimizer(list(self.weights.values()))
        if self._scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": self._scheduler(optimizer), "interval": "step"}]


def kept_in(trainer: pl.Trainer) -> Path | None:
    """The folder of checkpoints, and of what else an interrupted fit goes on from; None where nothing is kept."""
    keeper = trainer.checkpoint_callback
    return Path(keeper.dirpath) if keeper and keeper.dirpath else None


def _last_checkpoint(trainer: pl.Trainer) -> Path | None:
    """Where an interrupted fit goes on."""
    folder = kept_in(trainer)
    last = folder / "last.ckpt" if folder else None
    return last if last and last.exists() else None

"""The contract: `fit(model, task) -> erasure`, and the model is left bit-identical.

Methods differ in how they compute the erasure: they minimise a loss (TrainedMethod), solve a linear system, count
codes, combine other methods, or do nothing.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from itertools import chain
from types import MappingProxyType
from typing import ClassVar, Generic, Self

import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer

from unlearning.concepts import UnlearningTask
from unlearning.config.values import Count
from unlearning.erasures.base import Erasure
from unlearning.errors import UserError
from unlearning.models.base import Model, ModelT
from unlearning.models.diffusion import DiffusionModel
from unlearning.store.loops import kept_in
from unlearning.training import checkpoints
from unlearning.training.batches import Batches, Prompts, seed_of
from unlearning.training.regulariser import Constraint, Regulariser, hold
from unlearning.training.student import Student
from unlearning.training.trainers import share_batches


class Method(ABC, Generic[ModelT]):
    """A method's constructor stores hyperparameters, and nothing else.

    Attributes:
        works_on: The class of models that it can edit; any other is refused before weights are loaded.
        writable: Whether its erasures can be written into the weights of a model (`Erasure.write_into`).
        figures: Images that explain the last fit, by caption; the run keeps them and the report shows them.
    """

    works_on: type[Model] = DiffusionModel
    writable: bool = True
    figures: Mapping[str, Image.Image] = MappingProxyType({})

    @abstractmethod
    def fit(self, model: ModelT, task: UnlearningTask) -> Erasure:
        """The erasure of the task's concepts from the model, which may have other erasures applied to it.

        Raises:
            UserError: If the model or the task lacks what the method needs.
        """


class TrainedMethod(Method[DiffusionModel], pl.LightningModule):
    """A method that minimises a loss.

    Subclasses implement `loss` in their paper's notation, with `self.student` (the model that is trained) and
    `self.teacher` (the frozen model before training). Both share the memory of all parameters that are not trained.

    Args:
        student: The trainable parameters: weights of the model, or modules beside its layers (training/student.py).
        optimizer: Makes an optimizer from a list of parameters.
        scheduler: Makes a learning-rate schedule from an optimizer, stepped at every iteration; None for none.
        trainer: Makes the Lightning Trainer, given max_steps.
        iterations: Steps of the optimizer.
        batch_size: Prompts of the erased concepts in a step, or images for a method that learns from images.
        regulariser: Limits how far the weights move (methods/regularisers.py); None for no limit.

    Attributes:
        trains: The class of students that the method accepts.
        max_grad_norm: The norm to which gradients are clipped; None for what the Trainer does (gradient_clip_val).
        resumed: Names of attributes with `state()` and `restore(state)` that a checkpoint holds beside the weights.
    """

    trains: ClassVar[type[Student]] = Student
    max_grad_norm: float | None = None
    resumed: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        *,
        student: Student,
        optimizer: Callable,
        trainer: Callable,
        iterations: Count,
        batch_size: Count = 1,
        scheduler: Callable | None = None,
        regulariser: Regulariser | None = None,
    ):
        super().__init__()
        self.regulariser = regulariser or Regulariser()
        self.moving, self.iterations, self.batch_size = student, iterations, batch_size
        self.make_optimizer, self.make_scheduler, self._make_trainer = optimizer, scheduler, trainer

    @abstractmethod
    def loss(self, batch) -> Tensor:
        """The objective () on a batch of `data`."""

    def data(self) -> Batches:
        """The training data; by default prompts of the erased concepts. Student, teacher and task are set by then."""
        return Prompts([self.task.prompt(concept.name) for concept in self.task.erase], self.batch_size)

    def constraints(self) -> Mapping[str, Constraint]:
        """The constraints by weight name, which hold after every step. Called before the first step, after `data`."""
        return self.regulariser.constraints(self)

    def steps(self) -> int:
        """The number of optimizer steps. The task is set by then."""
        return self.iterations

    def fit(self, model: DiffusionModel, task: UnlearningTask) -> Erasure:
        self.check_student()
        return self.regulariser.fit(self._fit, model, task)

    def check_student(self) -> None:
        """Raises UserError for a student of another class than `trains`."""
        if not isinstance(self.moving, self.trains):
            kind = self.trains.__name__
            raise UserError(f"{type(self).__name__} trains a {kind}: student@method.student={kind.lower()}.")

    def _fit(self, model: DiffusionModel, task: UnlearningTask) -> Erasure:
        if model.autocast == torch.float16:
            raise UserError(
                "Most gradients are too small for float16: model.autocast=bfloat16, or trainer.precision=16-mixed, "
                "which scales them."
            )
        self.seed, self.task = torch.initial_seed(), task
        own = checkpoints.key_of(self, model.state)  # before the model becomes an attribute of the method
        gated = model.without_checkpointing() if model.side else nullcontext()  # of an earlier erasure
        with gated, self.moving.of(model) as pair:
            self.student, self.teacher, self.pair = pair.student, pair.teacher, pair
            # Registered under names without dots: DDP averages their gradients, checkpoints hold them and nothing else.
            self.weights = nn.ParameterDict({n.replace(".", "/"): p for n, p in pair.parameters.items()})
            try:
                self._train(own)
                return pair.erasure()
            finally:
                del self.student, self.teacher, self.pair, self.task, self.weights
                self._constraints: Mapping[str, Constraint] = {}
                torch.manual_seed(self.seed)  # what follows does not depend on where an interrupted fit was resumed

    def _train(self, own: str) -> None:
        """Minimises the loss, from the last checkpoint if there is one. Releases the optimizer's states at the end."""
        trainer = self._make_trainer(max_steps=self.steps())
        try:
            if trainer.precision in ("16-true", "bf16-true"):
                raise UserError(
                    f"trainer.precision={trainer.precision} would round the small steps of training away: "
                    f"trainer.precision={trainer.precision.replace('true', 'mixed')}."
                )
            share_batches(trainer)
            checkpoints.keep_under(trainer, self._key(trainer, own))
            with kept_in(None):  # checkpoints take its place
                trainer.fit(self, datamodule=self.data(), ckpt_path=checkpoints.last(trainer))
        finally:
            # Not left to the garbage collector: a Trainer refers to itself, and Adam's states are twice the weights.
            trainer.strategy.optimizers, trainer.strategy.lr_scheduler_configs = [], []
            self._trainer = None

    def _free_gradients(self) -> None:
        for parameter in self.weights.values():
            parameter.grad = None

    def _key(self, trainer: pl.Trainer, own: str) -> str:
        """A digest of all that the training depends on; `own` is that of the method and of the model's state."""
        task, course = self.task, (trainer.precision, trainer.accumulate_grad_batches, trainer.gradient_clip_val)
        captions = task.retain_captions() if task.retain_captions else ()
        images = [checkpoints.key_of(image) for image in chain(task.forget_images, task.retain_images)]
        known = (task.erase, task.retain, task.template, images, captions)
        return checkpoints.key_of(own, known, course, trainer.world_size)

    def setup(self, stage: str) -> None:
        self._constraints = self.constraints()

    def cpu(self) -> Self:
        """Returns itself. A Trainer moves the module to the CPU at the end, but these weights belong to the model."""
        return self

    def losses(self, count: int, loss: Callable[..., Tensor] | None = None, first: int = 0) -> Iterator[Tensor]:
        """An objective, by default the method's own, on `count` batches from the `first` on, each with its own noise.

        For computations before the first step. The values are equal in every process, and after an interruption.
        """
        for k in range(first, first + count):
            torch.manual_seed(seed_of(self.seed, k))
            with self.trainer.precision_plugin.forward_context():
                yield (loss or self.loss)(self.trainer.datamodule.batch(k))

    def training_step(self, batch, batch_idx: int) -> Tensor:
        # Noise is a function of the step and of the batch's number in it. So a resumed fit sees the same noise, and n
        # processes compute the same as one process that accumulates n batches.
        turn = batch_idx % self.trainer.accumulate_grad_batches * self.trainer.world_size + self.global_rank
        torch.manual_seed(seed_of(self.seed, 0, self.global_step, turn))
        loss = self.loss(batch) + self.regulariser.penalty(self.pair.parameters, self.pair.start)
        self._check_finite(torch.isfinite(loss), f"The loss is {loss.item()} at step {self.global_step}.")
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def optimizer_step(self, *args, **kwargs) -> None:
        step = self.global_step
        super().optimizer_step(*args, **kwargs)
        self._free_gradients()  # Lightning would keep them until after the next forward pass
        hold(self.pair, self._constraints)
        finite = all(torch.isfinite(p).all() for p in self.weights.values())
        self._check_finite(finite, f"The weights are not finite at step {step + 1}.")  # before they are in a checkpoint

    def configure_gradient_clipping(self, optimizer: Optimizer, *args, **kwargs) -> None:
        if self.max_grad_norm is None:
            super().configure_gradient_clipping(optimizer, *args, **kwargs)
        else:
            self.clip_gradients(optimizer, self.max_grad_norm, "norm")

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint |= {name: getattr(self, name).state() for name in self.resumed}

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        for name in self.resumed:
            getattr(self, name).restore(checkpoint[name])

    @staticmethod
    def _check_finite(finite: bool | Tensor, message: str) -> None:
        if not finite:
            raise UserError(
                f"{message} The last checkpoint, if there is one, holds finite weights; a smaller "
                "method.optimizer.lr usually helps."
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.make_optimizer(list(self.weights.values()))
        if self.make_scheduler is None:
            return optimizer
        return [optimizer], [{"scheduler": self.make_scheduler(optimizer), "interval": "step"}]

"""The Lightning Trainer of a run, as each of its stages makes it."""

import os
from collections.abc import Sequence
from functools import partial

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from pytorch_lightning.plugins.environments import LightningEnvironment, SLURMEnvironment
from pytorch_lightning.utilities import rank_zero_only
from torch.utils.data import DataLoader

from unlearning.errors import UserError
from unlearning.training.checkpoints import AtomicCheckpoints


def prepared(trainer: partial[pl.Trainer]) -> partial[pl.Trainer]:
    """The trainer, with checkpoints that are written completely or not at all, and on one device as a run of its own.

    A launcher such as `srun` numbers the processes that it starts, and Lightning takes them for ranks of one
    distributed run. They are only if the trainer has several devices or nodes.
    """
    trainer = trainer if shows_progress(trainer) else without_bar(trainer)
    plugins = [*(trainer.keywords.get("plugins") or ()), AtomicCheckpoints()]
    if _is_alone(trainer):
        rank_zero_only.rank = 0
        plugins.append(LightningEnvironment())
    return partial(trainer, plugins=plugins)


def number_process(trainer: pl.Trainer) -> None:
    """Gives a rank that `srun` has started the number of its device as other launchers do, in LOCAL_RANK."""
    if isinstance(getattr(trainer.strategy, "cluster_environment", None), SLURMEnvironment):
        os.environ["LOCAL_RANK"] = str(trainer.local_rank)


def launch(trainer: partial[pl.Trainer]) -> None:
    """Starts the other processes of a distributed run, if there are any, so that all decide together from here on."""
    if _is_alone(trainer):
        return
    own = without_bar(trainer)()
    if (processes := own.num_devices * own.num_nodes) > 1:
        own.predict(_Nothing(), DataLoader(range(processes)), return_predictions=False)  # type: ignore[arg-type]


def share_batches(trainer: pl.Trainer) -> None:
    """Divides the accumulated batches of a step among the processes, so that their number does not change the step.

    Raises:
        UserError: If there are fewer batches than processes, or they cannot be divided evenly.
    """
    batches, processes = trainer.accumulate_grad_batches, trainer.world_size
    if batches % processes:
        raise UserError(
            f"{processes} processes share the batches of a step, and trainer.accumulate_grad_batches={batches} is no "
            f"multiple of {processes}. With trainer=ddp trainer.accumulate_grad_batches={processes}, a step learns "
            f"from {processes} × method.batch_size, as on one device with the same setting."
        )
    trainer.accumulate_grad_batches = batches // processes


class _Nothing(pl.LightningModule):
    def predict_step(self, *_: object) -> int:
        return 0  # Lightning warns of None


def shows_progress(trainer: partial[pl.Trainer]) -> bool:
    """Whether the trainer has a progress bar."""
    return trainer.keywords.get("enable_progress_bar", True)


def without_bar(trainer: partial[pl.Trainer]) -> partial[pl.Trainer]:
    """The trainer without its progress bar, nor the callback for it, which Lightning takes for a contradiction."""
    callbacks = trainer.keywords.get("callbacks") or ()
    kept = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
    return partial(trainer, enable_progress_bar=False, callbacks=kept)


def _is_alone(trainer: partial[pl.Trainer]) -> bool:
    devices = trainer.keywords.get("devices")
    listed = list(devices) if isinstance(devices, Sequence) and not isinstance(devices, str) else None
    one = len(listed) == 1 if listed is not None else devices in (1, "1")
    return one and trainer.keywords.get("num_nodes", 1) == 1

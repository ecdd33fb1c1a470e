"""Digests of everything that an erasure depends on, and of the data of a task."""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from unlearning.concepts import UnlearningTask
from unlearning.config.decisive import decisive
from unlearning.erasures.base import Erasure
from unlearning.models.base import Model
from unlearning.store.files import digest, file_digest
from unlearning.store.finished import state


def image_digests(task: UnlearningTask) -> list:
    """The shape and a digest of each image that a method may learn from."""
    images = chain(task.forget_images, task.retain_images)  # one at a time: there may be many
    return [(image.shape, hashlib.sha256(image.tobytes()).hexdigest()) for image in images]


def data_key(task: UnlearningTask, images: list) -> str:
    """A digest of the task: what a method may use, and the evaluation.

    Args:
        images: The `image_digests` of the task.
    """
    return digest(_known(task), images, (task.prompts, task.images_per_prompt, list(task.inputs)))


def fit_key(
    model: Model, task: UnlearningTask, images: list, settings: Mapping, seed: int, before: Sequence[Erasure]
) -> str:
    """A digest of all that an erasure depends on: model, method, trainer, seed, earlier erasures, known data.

    Args:
        images: The `image_digests` of the task.
        settings: The resolved config.
        before: The earlier erasures, which are applied during the fit.
    """
    decided = decisive(settings, "erasure")
    fitting = (decided.get("method"), decided.get("trainer"))
    files = [file_digest(Path(path)) for path, *_ in state(decided.get("method"))]  # that a method reads
    captions = list(task.retain_captions()) if task.retain_captions else []
    earlier = [erasure.digest for erasure in before]
    data = (images, earlier, *([files] if files else []), *([captions] if captions else []))
    return digest(model.fingerprint, model.numerics, fitting, seed, _known(task), *data)


def _known(task: UnlearningTask) -> tuple:
    """What a method may use of the task, besides images."""
    return task.erase, task.retain, task.template

"""The model that never knew: trained by the same recipe without the concept, no image and no caption of it.

Nothing is erased. It is the ideal result of an eraser, and the lower bound of every attack: what an attack brings back
from a model that never saw the concept is the work of the attack itself.
"""

from pathlib import Path

import torch

from unlearning.concepts import UnlearningTask
from unlearning.erasures.weight_patch import WeightPatch
from unlearning.errors import UserError
from unlearning.methods.base import Method
from unlearning.models.diffusion import DiffusionModel
from unlearning.models.stable_diffusion import StableDiffusion


class Oracle(Method[StableDiffusion]):
    """The model that never knew the concept, from a folder.

    Args:
        path: The folder of the model that was trained without the concepts of the run.
    """

    works_on = StableDiffusion

    def __init__(self, *, path: str):
        self.path = path

    @torch.no_grad()
    def fit(self, model: StableDiffusion, task: UnlearningTask) -> WeightPatch:
        if not (folder := Path(self.path).expanduser()).is_dir():
            names = " ".join(f"'{concept.name}'" for concept in task.erase)
            raise UserError(
                f"There is no model that never knew {task.name!r} at {folder}. An embedded one is made by\n"
                f"    python experiments/openmoji/train_clip.py first --without {names}\n"
                f"    python experiments/openmoji/train_unet.py --without {names}\n"
                "and taken with method.path=/its/folder."
            )
        other = type(model).load(str(folder), device=str(model.device))
        own, never = model.named_parameters(), other.named_parameters()
        shapes = [{name: tuple(w.shape) for name, w in weights.items()} for weights in (own, never)]
        if differing := {name for name, _ in shapes[0].items() ^ shapes[1].items()}:
            raise UserError(
                f"{folder} is of another architecture than {model.name}: its {min(differing)} is not the same."
            )
        _check_text(model, other)
        return WeightPatch({name: w.clone() for name, w in never.items() if not torch.equal(w, own[name])})


def _check_text(model: DiffusionModel, other: DiffusionModel) -> None:
    """Raises UserError if the models number the pieces of words differently."""
    for part in model.text_encoders:
        if model.token_table(part)[1] != other.token_table(part)[1]:
            raise UserError(
                f"{other.name} has another vocabulary than {model.name}: its weights would read other words."
            )

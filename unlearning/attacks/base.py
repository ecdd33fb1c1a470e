"""The contract of an attack: `find(model, task, rows, observed) -> AttackResult`.

An attack sees the erased model as a model: it never learns which method erased, or how. It leaves the model
bit-identical.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Generic, Literal, TypeVar, cast

from unlearning.concepts import UnlearningTask
from unlearning.errors import UserError
from unlearning.models.base import Model, ModelT
from unlearning.models.diffusion import DiffusionModel
from unlearning.sampling.attack_result import AttackResult
from unlearning.sampling.sampler import Sampler
from unlearning.store.manifest import ManifestRow

T = TypeVar("T")
ObservedT = TypeVar("ObservedT")  # what an attack takes from the unedited model
Access = Literal["white", "text encoder", "black"]  # weights and gradients; those of the text encoder; images only


class Attack(ABC, Generic[ModelT, ObservedT]):
    """The base class of attacks. The constructor stores hyperparameters, and nothing else.

    `rows` are the evaluation's images of erased concepts: prompt, seed, guidance scale and labels of each.

    Attributes:
        access: What it uses of the erased model.
        version: Increased when its results change, so that stored results are not reused.
        works_on: The class of models it can attack.
        own_size: Whether it attacks images of the model's own size only: it takes latents from the unedited model.
    """

    access: Access
    version: ClassVar[int] = 1
    works_on: ClassVar[type[Model]] = DiffusionModel
    own_size: ClassVar[bool] = False

    def check_rows(self, model: ModelT, rows: Sequence[ManifestRow]) -> None:
        """Raises UserError if there are no rows, or if they cannot be attacked. Runs before the fit."""
        if not rows:
            raise UserError("There is nothing to attack: this dataset has no prompt for an erased concept.")
        if self.own_size and (others := _other_sizes(cast(DiffusionModel, model), rows)):
            raise UserError(
                f"{type(self).__name__} attacks images of the model's own size, and some prompts ask for others "
                f"({', '.join(others)}). dataset.sizes=false, or a list without columns of sizes, gives all images the "
                "model's size."
            )

    def observe(
        self, model: ModelT, task: UnlearningTask, rows: Sequence[ManifestRow]
    ) -> ObservedT | AttackResult | None:
        """What the attack needs of the unedited model; by default nothing. Called before the erasure is applied.

        An AttackResult ends the attack: it is a transfer attack, and its result serves every erasure from that model.
        """
        return None

    @abstractmethod
    def find(
        self, model: ModelT, task: UnlearningTask, rows: Sequence[ManifestRow], observed: ObservedT
    ) -> AttackResult:
        """The inputs with which the erased `model` may show the concept, for each prompt or for each row.

        Raises:
            UserError: If the attack cannot be run. A failed attack is no evidence of robustness.
        """

    def sampler(self, sampler: Sampler) -> Sampler:
        """The sampler of the attacked images; by default that of all others."""
        return sampler


def _other_sizes(model: DiffusionModel, rows: Sequence[ManifestRow]) -> list[str]:
    """The sizes of rows whose images are not of the model's own size: "512×768"."""
    sizes = dict.fromkeys((row.width, row.height) for row in rows)
    others = [(w, h) for w, h in sizes if model.at_size(h, w).latent_shape != model.latent_shape]
    return [f"{w or 'own'}×{h or 'own'}" for w, h in others]


def concept_of(row: ManifestRow, task: UnlearningTask) -> str:
    """The name of the erased concept that a row belongs to."""
    return row.concept or task.erase[0].name


def prompts_of(rows: Sequence[ManifestRow]) -> list[ManifestRow]:
    """The first row of each prompt: for attacks that find one thing for all images of a prompt."""
    return list({row.prompt: row for row in reversed(rows)}.values())[::-1]


def settings_for(settings: Sequence[T], count: int) -> list[T]:
    """A setting for each of `count` images: in turn, or spread from the first to the last if there are fewer images."""
    if count >= len(settings):
        return [settings[i % len(settings)] for i in range(count)]
    return [settings[round(i * (len(settings) - 1) / max(1, count - 1))] for i in range(count)]


def with_placeholder(prompt: str, name: str) -> str:
    """The prompt with "{}" in the place of a concept's name, or before the prompt that does not have it."""
    pattern = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", re.IGNORECASE)
    replaced, count = pattern.subn("{}", prompt)
    return replaced if count else f"{{}} {prompt}"

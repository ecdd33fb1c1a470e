"""The result of a method: a frozen edit of a model that can be applied and undone, composed, saved and loaded."""

import copy
import hashlib
import importlib
import json
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, Self, TypeVar, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as serialised
from torch import Tensor

from unlearning.errors import UserError
from unlearning.models.base import Model, ModelT
from unlearning.store.files import digest, write_atomically

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

HEADER = """\
# {title}

{how}

Made by `unlearning` from `{base}`.
"""
ROOT = Path(__file__).parents[2]  # of the package
SETTINGS, WEIGHTS = "erasure.json", "weights.safetensors"
T = TypeVar("T")
NOT_IN_NETWORKS = (
    "This erasure changes more than the networks, and a diffusers pipeline would ignore the rest. Generate with "
    '`with erasure.applied_to(pipe) as model: images = Sampler()(model, ["a prompt"], seeds=[0])`; Sampler is in '
    "unlearning.sampling.sampler."
)
NOT_WRITABLE = (
    "This erasure cannot be written into the weights of a model: it acts while images are generated. Take the erasure "
    "(return_erasure=True), and apply it: `with erasure.applied_to(pipe) as model: ...`."
)


class Base(NamedTuple):
    """Name and fingerprint of the model that an erasure was made from."""

    name: str = "the model that it was made from"
    fingerprint: str = ""


class Erasure(ABC, Generic[ModelT]):
    """A frozen edit of a model. Erasures nest, and each undoes only what it did itself.

    `with erasure.applied_to(model):` the model is the erased one; afterwards it is, to the bit, what it was before.
    """

    _base = Base()

    @contextmanager
    def applied_to(self, model: "ModelT | DiffusionPipeline") -> Iterator:
        """A context in which `model` is the erased model.

        Args:
            model: A model, or a diffusers pipeline. If the erasure is not `in_networks`, a call of the pipeline itself
                raises UserError within the context.

        Yields:
            The erased model; for a pipeline, the model of its family.

        Raises:
            UserError: If the erasure is not for this model.
        """
        if not isinstance(model, Model):
            from unlearning.models.families import as_model, refusing_calls

            refusing = nullcontext() if self.in_networks else refusing_calls(model, NOT_IN_NETWORKS)
            with as_model(model) as wrapped, refusing, self.applied_to(cast(ModelT, wrapped)):
                yield wrapped
            return
        with self._applied(cast(ModelT, model)):
            model.applied = (*model.applied, self.digest)
            try:
                yield model
            finally:
                model.applied = model.applied[:-1]

    @abstractmethod
    def _applied(self, model: ModelT) -> AbstractContextManager: ...

    @abstractmethod
    def usage(self, base: Model) -> str:
        """Instructions (Markdown) for using the saved erasure in plain diffusers, with the model `base`."""

    @abstractmethod
    def _settings(self) -> dict:
        """Everything that is not a tensor, as JSON."""

    def _tensors(self) -> Mapping[str, Tensor]:
        return {}

    @property
    def empty(self) -> bool:
        """Whether it changes nothing."""
        return False

    @property
    def writable(self) -> bool:
        """Whether it consists of new values for weights only, so that `write_into` can store it in the model."""
        return False

    @property
    def in_networks(self) -> bool:
        """Whether a diffusers pipeline with the same networks also generates erased images, while it is applied."""
        return self.writable

    def write_into(self, model: ModelT) -> None:
        """Writes the erasure into the model's weights for good.

        Raises:
            UserError: If it is not `writable`, or not for this model.
        """
        if not self.writable:
            raise UserError(NOT_WRITABLE)
        with self._applied(model):  # raises, before anything is written, if it is not for this model
            pass
        self._write(model)

    def _write(self, model: ModelT) -> None:
        raise NotImplementedError

    def made_from(self, base: Model) -> Self:
        """A copy with the name and the fingerprint of its model, which `save` writes."""
        made = copy.copy(self)
        object.__setattr__(made, "_base", Base(base.name, base.fingerprint))
        return made

    @classmethod
    @abstractmethod
    def _restore(cls, settings: dict, tensors: dict[str, Tensor]) -> "Erasure": ...

    @property
    def digest(self) -> str:
        """A digest of its content: class, settings and every tensor."""
        return digest(path_of(type(self)), self._settings(), _digests(self._tensors()))

    def save(self, folder: str | Path, *, base: Model | None = None, title: str = "An erased concept") -> None:
        """Writes erasure.json, weights.safetensors if there are tensors, and a README that says how to use them.

        Args:
            base: The model that was erased from, if the erasure is not `made_from` it. The README contains its name,
                erasure.json its fingerprint.
        """
        folder, base = Path(folder), base or cast(Model, self._base)
        folder.mkdir(parents=True, exist_ok=True)
        if self._tensors():
            weights = serialised({k: v.contiguous().cpu() for k, v in self._tensors().items()})
            write_atomically(folder / WEIGHTS, weights)  # an error of save_file is not an OSError
        write_atomically(folder / "README.md", HEADER.format(title=title, how=self.usage(base), base=source(base)))
        settings = {"kind": path_of(type(self)), "base": base.fingerprint, "tensors": _digests(self._tensors())}
        write_atomically(folder / SETTINGS, json.dumps({**settings, "settings": self._settings()}, indent=2))

    @staticmethod
    def load(folder: str | Path) -> "Erasure":
        """Reads what `save` wrote.

        Raises:
            UserError: If there is no erasure, it is broken or incomplete, or this version does not know its class.
        """
        folder = Path(folder)
        saved = _read(folder)
        tensors = _read_tensors(folder / WEIGHTS) if saved["tensors"] else {}
        for name, expected in saved["tensors"].items():
            if name not in tensors or _digests({name: tensors[name]})[name] != expected:
                what = "lacks" if name not in tensors else "has other values for"
                raise UserError(
                    f"{folder / WEIGHTS} {what} the tensor {name}: the erasure is not what was saved. Delete {folder}, "
                    "and the same command makes it again; or copy the whole folder again."
                )
        return located(saved["kind"], Erasure)._restore(saved["settings"], tensors)

    @staticmethod
    def base_of(folder: Path) -> str:
        """The fingerprint of the model that a saved erasure was made from."""
        return _read(folder)["base"]


def source(base: Model) -> str:
    """The source from which others load the model: a repository on the hub, a path in this one, or their own folder."""
    path = Path(base.name)
    if not path.is_absolute():
        return base.name
    return str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else f"path/to/{path.name}"


def path_of(kind: type) -> str:
    """The dotted path of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def located(path: str, base: type[T]) -> type[T]:
    """The class at a dotted path: of this package, imported if need be, or of a module that is imported already.

    Raises:
        UserError: If the path leads elsewhere, or to something that is not a subclass of `base`.
    """
    module, _, name = path.rpartition(".")
    if module.startswith(f"{__package__.partition('.')[0]}."):
        with suppress(ImportError):
            importlib.import_module(module)
    kind = getattr(sys.modules.get(module), name, None)  # no other module is imported: a file is no reason to run code
    if not (isinstance(kind, type) and issubclass(kind, base)):
        raise UserError(f"{path} is not a {base.__name__} of this version of unlearning.")
    return kind


def _read(folder: Path) -> dict:
    path = folder / SETTINGS
    if not path.exists():
        raise UserError(f"There is no erasure in {folder}: run the fit stage first, or choose the folder of another.")
    try:
        saved = json.loads(path.read_text())
        if not {"kind", "base", "tensors", "settings"} <= saved.keys():
            raise ValueError("it lacks keys of an erasure")
        return saved
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is broken: {error}. Delete {folder}, and the same command makes it again.") from error


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if not path.exists():
        raise UserError(f"{path} is missing: copy the whole folder, or delete {path.parent} to make it again.")
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is broken: {error}. Delete {path.parent} to make it again.") from error


def _digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Twelve hexadecimal digits for each tensor: of its shape, dtype and values."""
    return {name: _digest(tensor) for name, tensor in tensors.items()}


def _digest(tensor: Tensor) -> str:
    tensor = tensor.detach().cpu().contiguous()
    head = f"{tuple(tensor.shape)} {tensor.dtype}".encode()
    return hashlib.sha256(head + tensor.view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:12]


def as_json(part: object) -> dict:
    """A frozen dataclass that an erasure holds, with the path of its class. Fields are what JSON can hold."""
    compared = [f.name for f in fields(part) if f.compare]  # type: ignore[arg-type]
    return {"kind": path_of(type(part)), **{name: getattr(part, name) for name in compared}}


def from_json(saved: Mapping, base: type[T]) -> T:
    """The inverse of `as_json`. Raises UserError if the class is not a subclass of `base`."""
    settings = {name: tuple(v) if isinstance(v, list) else v for name, v in saved.items() if name != "kind"}
    return located(saved["kind"], base)(**settings)

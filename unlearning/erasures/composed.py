"""Several erasures, one after the other."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from unlearning.erasures.base import Erasure, located, path_of


@dataclass(frozen=True)
class Composed(Erasure):
    """Erasures that are applied in this order, each on top of those before.

    Args:
        parts: The erasures.
    """

    parts: tuple[Erasure, ...] = field(repr=False)

    @contextmanager
    def _applied(self, model) -> Iterator[None]:
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(part.applied_to(model))
            yield

    def usage(self, base) -> str:
        steps = (f"### Step {i + 1}\n\n{part.usage(base)}" for i, part in enumerate(self.parts))
        prefixed = "Tensors of step n have the prefix `n.` here, from `0.` on; without it they are named as below."
        return "\n\n".join([f"{len(self.parts)} edits, in this order. {prefixed}", *steps])

    def _settings(self) -> dict:
        return {"parts": [{"kind": path_of(type(part)), "settings": part._settings()} for part in self.parts]}

    def _tensors(self) -> Mapping[str, Tensor]:
        return {f"{i}.{name}": value for i, part in enumerate(self.parts) for name, value in part._tensors().items()}

    @classmethod
    def _restore(cls, settings: dict, tensors: dict[str, Tensor]) -> "Composed":
        def restored(i: int, saved: dict) -> Erasure:
            own = {n.removeprefix(f"{i}."): v for n, v in tensors.items() if n.startswith(f"{i}.")}
            return located(saved["kind"], Erasure)._restore(saved["settings"], own)

        return cls(tuple(restored(i, saved) for i, saved in enumerate(settings["parts"])))


def composed(*parts: Erasure) -> Erasure:
    """The erasures in this order; one alone is itself, and what is composed already is not nested."""
    flat = [one for part in parts for one in (part.parts if isinstance(part, Composed) else (part,))]
    return flat[0] if len(flat) == 1 else Composed(tuple(flat))

"""Several erasures, one after the other."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import Tensor

from unlearning.erasures.base import Erasure, located, path_of
from unlearning.erasures.weight_patch import WeightPatch
from unlearning.models.base import Model


@dataclass(frozen=True)
class Composed(Erasure):
    """Erasures that are applied in this order, each on top of those before.

    Args:
        parts: The erasures.
    """

    parts: tuple[Erasure, ...] = field(repr=False)

    @contextmanager
    def _applied(self, model: Model) -> Iterator[None]:
        with ExitStack() as stack:
            for part in self.parts:
                stack.enter_context(part.applied_to(model))
            yield

    @property
    def writable(self) -> bool:
        return all(part.writable for part in self.parts)

    @property
    def in_networks(self) -> bool:
        return all(part.in_networks for part in self.parts)

    def _write(self, model: Model) -> None:
        # New weights first: an adapter adds to the weights that there are, also to those of a later patch.
        for part in sorted(self.parts, key=lambda part: not isinstance(part, WeightPatch)):
            part._write(model)

    def usage(self, base: Model) -> str:
        steps = (f"### Step {i + 1}\n\n{part.usage(base)}" for i, part in enumerate(self.parts))
        prefixed = (
            "Tensors of step n have the prefix `n.` here, from `0.` on; without it they are named as below. In the "
            'code below, `erasure` is `Erasure.load(Path(".")).parts[n]`.'
        )
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
    """The erasures in this order, as the simplest equivalent erasure.

    Compositions are flattened, empty erasures are left out, and consecutive patches are merged; later values win.
    """
    kept: list[Erasure] = []
    for part in (one for whole in parts for one in (whole.parts if isinstance(whole, Composed) else (whole,))):
        if kept and isinstance(part, WeightPatch) and isinstance(kept[-1], WeightPatch):
            kept[-1] = WeightPatch({**kept[-1].weights, **part.weights})
        elif not part.empty:
            kept.append(part)
    return kept[0] if len(kept) == 1 else Composed(tuple(kept)) if kept else WeightPatch({})

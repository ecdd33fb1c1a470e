"""Memory, counted: the bytes of all tensors that are alive, whatever device they would be on."""

import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclass(frozen=True)
class Counted:
    """Seconds, and bytes at most.

    Args:
        kept: Between two steps: the model's weights, copies of them, states of prompts, ...
        gradients, optimizer: Of what is trained, and the optimizer's states.
        passing: The peak less these three: activations, images, and what a closed form adds up.
    """

    seconds: float
    kept: int
    gradients: int
    optimizer: int
    passing: int

    @property
    def peak(self) -> int:
        return self.kept + self.gradients + self.optimizer + self.passing


class Alive(TorchDispatchMode):
    """Counts the storages that are made within it. What a kernel needs for itself is not a tensor, and not counted.

    Attributes:
        bytes: Of the storages that are alive.
        peak: The largest value of `bytes` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **kwargs or {})
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self._add(tensor.untyped_storage())
        return made

    def leave_out(self, tensors: Sequence[Tensor]) -> None:
        """These exist already; a view of one is no new storage."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            self._known.add(storage._cdata)

    def _add(self, storage: torch.UntypedStorage) -> None:
        name, size = storage._cdata, storage.nbytes()
        if name not in self._known:
            self._known.add(name)
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            weakref.finalize(storage, self._remove, name, size).atexit = False

    def _remove(self, name: int, size: int) -> None:
        self._known.discard(name)
        self.bytes -= size


def counted(networks: Sequence[nn.Module], build: Callable[[], Callable[[], object]]) -> Counted:
    """What a call needs.

    Args:
        networks: Their weights and buffers are there already, and count.
        build: Makes what the call needs, as copies of a network; returns the call.
    """
    own = [tensor for network in networks for tensor in (*network.parameters(), *network.buffers())]
    alive = Alive()
    alive.leave_out(own)
    with alive, _optimizers(alive) as steps:
        call = build()
        built = alive.bytes
        start = time.perf_counter()
        call()
        seconds = time.perf_counter() - start
    kept, gradients, states = (max(column) for column in zip(*steps, (built, 0, 0), strict=True))
    return Counted(seconds, size(own) + kept, gradients, states, alive.peak - kept - gradients - states)


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct tensors."""
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())


@contextmanager
def _optimizers(alive: Alive) -> Iterator[list[tuple[int, int, int]]]:
    """A list of the bytes that are alive after each step of an optimizer: (all others, gradients, states)."""
    steps: list[tuple[int, int, int]] = []

    def note(optimizer: torch.optim.Optimizer, *_: object) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        gradients = size(p.grad for p in parameters if p.grad is not None)
        states = size(v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v))
        steps.append((alive.bytes - gradients - states, gradients, states))

    hook = register_optimizer_step_post_hook(note)
    try:
        yield steps
    finally:
        hook.remove()

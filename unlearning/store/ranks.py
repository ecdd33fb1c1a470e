"""The processes of a distributed run."""

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def rank() -> int:
    """The number of this process in the run, from 0."""
    from pytorch_lightning.utilities import rank_zero_only  # slow to import, and not needed to look at a store

    return rank_zero_only.rank


def first_rank() -> bool:
    """Whether this process is the first, or only, one of the run."""
    return rank() == 0


def of_first_rank(decide: Callable[[], T]) -> T:
    """What `decide()` returns, or raises, in the first process of a distributed run, in all of them.

    What a store holds may change while the processes look at it one after the other, because other runs write to it.
    """
    if not _distributed():
        return decide()
    import torch

    decision: list = [None, None]  # what was returned, and what was raised: no process may wait for one that has ended
    if first_rank():
        try:
            decision[0] = decide()
        except Exception as error:
            decision[1] = error
    torch.distributed.broadcast_object_list(decision)
    if decision[1] is not None:
        raise decision[1]
    return decision[0]


def wait_for_all_ranks() -> None:
    """Returns once all processes of a distributed run have come here."""
    if _distributed():
        import torch

        torch.distributed.barrier()


def _distributed() -> bool:
    import torch  # slow to import, as above

    return torch.distributed.is_available() and torch.distributed.is_initialized()

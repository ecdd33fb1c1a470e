"""The processes of a distributed run."""

import torch
from pytorch_lightning.utilities import rank_zero_only


def first_rank() -> bool:
    """Whether this process is the first, or only, one of the run."""
    return rank_zero_only.rank == 0


def wait_for_all_ranks() -> None:
    """Returns once all processes of a distributed run have come here."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()

"""The processes of a distributed run."""


def first_rank() -> bool:
    """Whether this process is the first, or only, one of the run."""
    from pytorch_lightning.utilities import rank_zero_only  # slow to import, and not needed to look at a store

    return rank_zero_only.rank == 0


def wait_for_all_ranks() -> None:
    """Returns once all processes of a distributed run have come here."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()

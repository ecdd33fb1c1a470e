"""What a stage costs: seconds, denoiser evaluations, peak memory."""

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from pytorch_lightning.utilities import rank_zero_only

from unlearning.images import write_atomically

METRICS = ("cost/seconds", "cost/denoiser_evaluations", "cost/peak_memory", "cost/artefact_bytes")


@contextmanager
def measured(path: Path, stage: str, model) -> Iterator[None]:
    """Adds the stage's costs to the JSON at `path`; a stage run in several sittings adds up.

    An evaluation is one latent through the denoiser once: a guided step of a batch of 16 is 32 of them. Memory is the
    accelerator's peak allocation in the stage, or without one the process's peak resident size so far; both in bytes.
    Of a distributed run the first process's are counted.
    """
    evaluations = 0

    def count(module, arguments, keywords):
        nonlocal evaluations
        evaluations += len(arguments[0])

    hook = model.network.register_forward_pre_hook(count, with_kwargs=True)
    on_cuda = model.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
    start = time.perf_counter()
    try:
        yield
    finally:
        hook.remove()
        peak = torch.cuda.max_memory_allocated(model.device) if on_cuda else _peak_resident()
        costs = read(path)
        spent = costs.setdefault(stage, {"seconds": 0.0, "denoiser_evaluations": 0, "peak_memory": 0})
        spent["seconds"] += time.perf_counter() - start
        spent["denoiser_evaluations"] += evaluations
        spent["peak_memory"] = max(spent["peak_memory"], peak)
        if rank_zero_only.rank == 0:
            write_atomically(path, json.dumps(costs, indent=2))


def _peak_resident() -> int:
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * 1024


def read(path: Path) -> dict[str, dict[str, float]]:
    """Costs by stage; empty before the first."""
    return json.loads(path.read_text()) if path.exists() else {}


def forget(path: Path, stage: str) -> None:
    """Drops a stage's costs, because it starts afresh."""
    if path.exists():
        write_atomically(path, json.dumps({k: v for k, v in read(path).items() if k != stage}, indent=2))


def metrics(path: Path, erasure: Path) -> dict[str, float]:
    """The costs of erasing, by metrics.json's names: of the fit, and the artefact's bytes."""
    spent = read(path).get("fit", {})
    size = sum(p.stat().st_size for p in erasure.iterdir()) if erasure.is_dir() else 0
    return {f"cost/{name}": value for name, value in spent.items()} | {"cost/artefact_bytes": size}

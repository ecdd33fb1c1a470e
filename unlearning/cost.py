"""What a stage costs: seconds, denoiser evaluations, peak memory; and on what machine."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from pytorch_lightning.utilities import rank_zero_only

from unlearning.images import write_atomically
from unlearning.provenance import hardware

METRICS = ("cost/seconds", "cost/denoiser_evaluations", "cost/peak_memory", "cost/artefact_bytes")
PROCESS = Path("/proc/self")  # where Linux tells a process about itself


@contextmanager
def measured(path: Path, stage: str, model) -> Iterator[None]:
    """Adds the stage's costs to the JSON at `path`; a stage run in several sittings adds up, on every machine it had.

    An evaluation is one latent through the denoiser once: a guided step of a batch of 16 is 32 of them. Memory is the
    accelerator's peak allocation in the stage, or without one the process's peak resident size in it, which only Linux
    tells; both in bytes. Of a distributed run the first process's are counted.
    """
    evaluations = 0

    def count(module, arguments, keywords):
        nonlocal evaluations
        evaluations += len(arguments[0])

    hook = model.network.register_forward_pre_hook(count, with_kwargs=True)
    on_cuda = model.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
    afresh = not on_cuda and _forget_peak()
    start = time.perf_counter()
    try:
        yield
    finally:
        hook.remove()
        peak = torch.cuda.max_memory_allocated(model.device) if on_cuda else _peak_resident() if afresh else None
        costs = read(path)
        spent = costs.setdefault(stage, {"seconds": 0.0, "denoiser_evaluations": 0})
        spent["seconds"] += time.perf_counter() - start
        spent["denoiser_evaluations"] += evaluations
        if peak is not None:
            spent["peak_memory"] = max(spent.get("peak_memory", 0), peak)
        spent["on"] = list(dict.fromkeys([*spent.get("on", ()), machine(model.device)]))
        if rank_zero_only.rank == 0:
            write_atomically(path, json.dumps(costs, indent=2))


def machine(device: torch.device) -> str:
    """What seconds and bytes depend on: "NVIDIA H100, 8 torch threads", and of a distributed run how many processes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else hardware()["cpu"]
    spread = torch.distributed.is_available() and torch.distributed.is_initialized()
    count = torch.distributed.get_world_size() if spread else 1
    processes = f", the first of {count} processes" if count > 1 else ""
    threads = torch.get_num_threads()
    return f"{name}, {threads} torch thread{'s' if threads > 1 else ''}{processes}"


def _forget_peak() -> bool:
    """Lets the process's peak resident size begin anew, which otherwise only rises; whether that could be done."""
    try:
        (PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _peak_resident() -> int | None:
    """Bytes since `_forget_peak`; None where nobody tells."""
    lines = (PROCESS / "status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def read(path: Path) -> dict[str, dict]:
    """Costs by stage, and what they were measured on; empty before the first."""
    return json.loads(path.read_text()) if path.exists() else {}


def forget(path: Path, stage: str) -> None:
    """Drops a stage's costs, because it starts afresh."""
    if path.exists():
        write_atomically(path, json.dumps({k: v for k, v in read(path).items() if k != stage}, indent=2))


def metrics(path: Path, erasure: Path) -> dict[str, float | str]:
    """The costs of erasing, by metrics.json's names: of the fit, and the artefact's bytes; with their protocols."""
    spent = read(path).get("fit", {})
    machines = " and ".join(spent.pop("on", ()))
    known = {"artefact_bytes": "all files of the erasure", "denoiser_evaluations": "latents through it in the fit"}
    known |= {name: f"of the fit, on {machines}" for name in ("seconds", "peak_memory") if machines}
    spent["artefact_bytes"] = sum(p.stat().st_size for p in erasure.iterdir()) if erasure.is_dir() else 0
    told = {f"cost/{name}": value for name, value in spent.items()}
    return told | {f"cost/{name}/protocol": known[name] for name in spent if name in known}

"""The cost of a stage: seconds, denoiser evaluations, peak memory, and the machine."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from pytorch_lightning.utilities import rank_zero_only

from unlearning.models.base import Model
from unlearning.store.files import read_state, write_atomically
from unlearning.store.metrics import Metric
from unlearning.tracking.provenance import hardware

METRICS = ("cost/seconds", "cost/denoiser_evaluations", "cost/peak_memory", "cost/artefact_bytes")
WRITE_EVERY = 10.0  # seconds; a killed process loses what it has not written
PROCESS = Path("/proc/self")  # Linux's files about this process


@contextmanager
def measured(path: Path, stage: str, model: Model) -> Iterator[None]:
    """A context that measures the costs of a stage, and adds them to those in the JSON file at `path`.

    An evaluation is one latent that goes through the denoiser once: a guided step with a batch of 16 counts 32. Memory
    is the peak allocation of the accelerator, or without one the peak resident size of the process, which only Linux
    reports; both in bytes. Of a distributed run, the first process is measured. The record also has "starts", how
    often the stage was started, and "lost", whether a process was killed, whose last seconds are then not counted.

    Args:
        path: The run's cost file.
        stage: The key for the costs: "fit", "generate", ...
        model: The model whose denoiser is counted.
    """
    on_cuda = model.device.type == "cuda"
    if on_cuda:
        torch.cuda.reset_peak_memory_stats(model.device)
    tracked = not on_cuda and reset_peak_resident()
    before, evaluations, start = read(path).get(stage, {}), 0, time.perf_counter()
    written = start

    def write(ended: bool = False) -> None:
        nonlocal written
        written = time.perf_counter()
        spent = {"seconds": before.get("seconds", 0.0) + written - start}
        spent["denoiser_evaluations"] = before.get("denoiser_evaluations", 0) + evaluations
        peak = torch.cuda.max_memory_allocated(model.device) if on_cuda else peak_resident() if tracked else None
        if peaks := [p for p in (before.get("peak_memory"), peak) if p is not None]:
            spent["peak_memory"] = max(peaks)
        spent |= {"starts": before.get("starts", 0) + 1, "ended": ended}
        spent["lost"] = before.get("lost", False) or not before.get("ended", True)
        spent["on"] = list(dict.fromkeys([*before.get("on", ()), machine(model.device)]))
        if rank_zero_only.rank == 0:
            write_atomically(path, json.dumps({**read(path), stage: spent}, indent=2))

    @torch.compiler.disable  # a compiled model would trace it, and the clock and the file with it
    def count(module, arguments, keywords):
        nonlocal evaluations
        evaluations += len(arguments[0])
        if time.perf_counter() > written + WRITE_EVERY:
            write()

    write()
    hook = model.network.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        write(ended=True)


def machine(device: torch.device) -> str:
    """The hardware that costs depend on: "NVIDIA H100, 8 torch threads", and the number of processes if distributed."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else hardware()["cpu"]
    spread = torch.distributed.is_available() and torch.distributed.is_initialized()
    count = torch.distributed.get_world_size() if spread else 1
    processes = f", the first of {count} processes" if count > 1 else ""
    threads = torch.get_num_threads()
    return f"{name}, {threads} torch thread{'s' if threads > 1 else ''}{processes}"


def reset_peak_resident() -> bool:
    """Resets the process's peak resident size, which otherwise only rises. Returns whether that was possible."""
    try:
        (PROCESS / "clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_resident() -> int | None:
    """The peak in bytes since `reset_peak_resident`; None if it is not known."""
    lines = (PROCESS / "status").read_text().splitlines()
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def read(path: Path) -> dict[str, dict]:
    """The costs by stage, with the machines they were measured on; empty if there are none yet."""
    return read_state(path, lambda costs: {stage: dict(spent) for stage, spent in costs.items()}) or {}


def forget(path: Path, stage: str) -> None:
    """Deletes the costs of a stage that starts again from the beginning."""
    if path.exists():
        write_atomically(path, json.dumps({k: v for k, v in read(path).items() if k != stage}, indent=2))


def take(other: Path, path: Path, stage: str) -> None:
    """Copies the costs of a stage from another run's file."""
    if spent := read(other).get(stage):
        write_atomically(path, json.dumps({**read(path), stage: spent}, indent=2))


def metrics(path: Path, erasure: Path) -> dict[str, Metric]:
    """The costs of the fit, and the size of the erasure's files in bytes.

    An interrupted fit repeats the steps after its last checkpoint, so the protocol says how often it was started.
    """
    record = read(path).get("fit", {})
    begun = f", begun {record['starts']} times" if record.get("starts", 1) > 1 else ""
    begun += ", without the last seconds before it was killed" if record.get("lost") else ""
    machines = " and ".join(record.get("on", ()))
    protocols = {"artefact_bytes": "all files of the erasure"}
    protocols["denoiser_evaluations"] = f"latents through it in the fit{begun}"
    protocols |= {name: f"of the fit, on {machines}{begun}" for name in ("seconds", "peak_memory") if machines}
    spent = {name: record[name] for name in ("seconds", "denoiser_evaluations", "peak_memory") if name in record}
    spent["artefact_bytes"] = sum(p.stat().st_size for p in erasure.rglob("*") if p.is_file())
    return {f"cost/{name}": Metric(value, protocols.get(name, "")) for name, value in spent.items()}

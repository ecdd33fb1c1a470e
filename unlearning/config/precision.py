"""Resolves `model.autocast=auto`: bfloat16 if the hardware is fast in it, otherwise float32."""

import logging
import platform
import time
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

AUTO = "auto"
FAST = {"avx512_bf16", "amx_bf16", "bf16"}  # flags of processors that compute in bfloat16; Arm's is the last
AMPERE = (8, 0)  # the first compute capability of NVIDIA with bfloat16 in hardware
log = logging.getLogger(__name__)


def settle(config: DictConfig, device: str) -> None:
    """Replaces `model.autocast=auto` by its value on this machine.

    Keys and records then name the dtype that is used.
    """
    if OmegaConf.select(config, "model.autocast") == AUTO:
        config.model.autocast = fast_autocast(config.model.dtype, device)


def chosen_autocast(autocast: str | None, dtype: str, device: str) -> str | None:
    """`autocast`, with "auto" resolved; see `fast_autocast`."""
    return fast_autocast(dtype, device) if autocast == AUTO else autocast


def fast_autocast(dtype: str, device: str) -> str | None:
    """ "bfloat16" if a model computes faster in it than in float32, otherwise None.

    Args:
        dtype: The weights' dtype; those in half precision need no autocast.
        device: As for `StableDiffusion.load`; of several GPUs the first one decides.
    """
    if dtype != "float32":
        return None
    fast = _fast_processor() if device == "cpu" or not _has_accelerator() else _fast_accelerator(device)
    return "bfloat16" if fast else None


def warn_if_slow(autocast: str | None, device: str) -> None:
    """Warns, with the factor, if bfloat16 is slower than float32 on this CPU; it takes about a second."""
    if autocast != "bfloat16" or device != "cpu" or _fast_processor():
        return
    factor = _slowdown()
    if factor > 1:
        log.warning(
            "model.autocast=bfloat16 is %.0f times slower than float32 on this processor, which emulates bfloat16. "
            "model.autocast=auto uses float32 here.",
            factor,
        )


def _fast_processor() -> bool:
    described = Path("/proc/cpuinfo")  # Linux only; elsewhere float32 is the safe choice
    lines = described.read_text().splitlines() if described.exists() else ()
    flags = (line.partition(":")[2].split() for line in lines if line.startswith(("flags", "Features")))
    return not FAST.isdisjoint(next(flags, ()))


def _has_accelerator() -> bool:
    """Whether there may be one: on Linux without a driver there is none, and torch need not be imported."""
    drivers = ("nvidiactl", "kfd", "dri", "dxg", "accel")  # NVIDIA, AMD, Intel, Windows' subsystem, others
    return platform.system() != "Linux" or any((Path("/dev") / driver).exists() for driver in drivers)


def _fast_accelerator(device: str) -> bool:
    import torch

    if torch.cuda.is_available() and device.startswith(("auto", "cuda")):
        return torch.version.hip is not None or torch.cuda.get_device_capability() >= AMPERE
    return _fast_processor() if device == "auto" and not torch.accelerator.is_available() else False


def _slowdown() -> float:
    """The time of a convolution in bfloat16 over its time in float32, on the CPU."""
    import torch

    layer, x = torch.nn.Conv2d(32, 32, 3, padding=1), torch.randn(2, 32, 16, 16)

    def seconds(dtype: torch.dtype) -> float:
        own, images = layer.to(dtype), x.to(dtype)
        own(images)
        start = time.perf_counter()
        for _ in range(3):
            own(images)
        return time.perf_counter() - start

    with torch.inference_mode():
        single = seconds(torch.float32)
        return seconds(torch.bfloat16) / single

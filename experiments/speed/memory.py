"""Peak memory of one side, in a process of its own.

    python -m experiments.speed.memory {ours,published} {model,sd14} MODEL DEVICE

Prints JSON, in bytes. On a CPU, `baseline` is the resident size after all imports and after loading the model, and
`peak` the largest resident size in two iterations of ESD-x (trajectories of one step, because longer ones need no
more memory). On CUDA, `peak` is torch.cuda.max_memory_allocated. `exact` is counted: the bytes of the denoiser's
weights with all copies, of their gradients and of the optimizer's states.
"""

import json
import logging
import re
import resource
import sys
import tempfile
from pathlib import Path

import diffusers
import pytorch_lightning as pl
import torch
from hydra.utils import instantiate

from experiments.gpu import architectures
from experiments.speed import published
from experiments.speed.subject import EXACT, config, fit


def resident(what: str) -> int:
    """VmRSS, or VmHWM, its peak; on other systems than Linux the peak of the process so far."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(re.search(rf"{what}:\s+(\d+)", status.read_text())[1]) * 1024


def exact(weights, optimizer) -> int:
    """Bytes of all distinct tensors: weights, gradients and the optimizer's states."""
    gradients = [w.grad for w in weights if w.grad is not None]
    states = [v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)]
    return sum({t.data_ptr(): t.nbytes for t in (*weights, *gradients, *states)}.values())


class Weigh(pl.Callback):
    def on_train_batch_end(self, trainer, module, *_):
        weights = [*module.student.denoiser.parameters(), *module.teacher.weights.values()]
        self.bytes = exact(weights, trainer.optimizers[0])


def main(side: str, size: str, path: str, device: str) -> dict[str, int]:
    logging.getLogger("pytorch_lightning").setLevel("ERROR")
    diffusers.utils.logging.disable_progress_bar()
    folder = Path(tempfile.mkdtemp())
    cfg = config(
        folder, f"model.path={path}", f"model.device={device}", f"trainer.accelerator={torch.device(device).type}",
        "method=esd_x", *EXACT, "method.iterations=2", "method.steps=1",
    )  # fmt: skip
    # On a CPU, half of SD1.4's latent side to save time: this makes the activations of both sides smaller.
    side14 = 32 if device == "cpu" else 64
    model = instantiate(cfg.model) if size == "model" else architectures.diffusion("SD1.4", device=device, side=side14)
    baseline = resident("VmRSS")
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    if side == "ours":
        weigh = Weigh()
        fit(cfg, model, weigh)
        counted = weigh.bytes
    else:
        settings = {"lr": cfg.method.optimizer.lr, "steps": 1, "guidance_scale": 3}
        trained = published.weights(cfg.method.student.parameters)
        esd = published.ESD(model, "a photo of the cat", trained=trained, **settings)
        list(esd.iterate(range(2)))
        counted = exact([*esd.teacher.parameters(), *esd.student.parameters()], esd.optimizer)
    peak = torch.cuda.max_memory_allocated() if device != "cpu" else resident("VmHWM")
    return {
        "baseline": baseline,
        "peak": peak,
        "growth": peak - baseline if device == "cpu" else peak,
        "exact": counted,
    }


if __name__ == "__main__":
    print("\n" + json.dumps(main(*sys.argv[1:])))

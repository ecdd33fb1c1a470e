"""Imports that processes.py shares with all processes that it starts."""

import gc
from importlib import import_module

NAMES = (
    "hydra", "matplotlib.pyplot", "optuna", "peft", "pytorch_lightning", "rich.console", "scipy.stats",
    "sklearn.cluster", "torch", "torch._dynamo", "torchmetrics", "torchvision.transforms", "wandb",
    "diffusers.pipelines.dit.pipeline_dit", "diffusers.pipelines.flux.pipeline_flux",
    "diffusers.pipelines.pixart_alpha.pipeline_pixart_alpha", "diffusers.pipelines.pixart_alpha.pipeline_pixart_sigma",
    "diffusers.pipelines.sana.pipeline_sana", "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3",
    "diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl",
)  # fmt: skip
for name in NAMES:
    import_module(name)
gc.freeze()  # so that no collection copies their memory, which processes share

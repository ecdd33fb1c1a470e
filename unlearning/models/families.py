"""The families of diffusion models, and pipelines of diffusers that are in memory already as models of theirs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps

from diffusers import DiffusionPipeline
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from unlearning.errors import UserError
from unlearning.models.dit import DiT
from unlearning.models.flux import Flux
from unlearning.models.pixart import PixArt
from unlearning.models.sana import Sana
from unlearning.models.stable_diffusion import StableDiffusion
from unlearning.models.stable_diffusion_3 import StableDiffusion3
from unlearning.models.stable_diffusion_xl import StableDiffusionXL
from unlearning.store.files import digest

FAMILIES: tuple[type[StableDiffusion], ...] = (
    StableDiffusion,
    StableDiffusionXL,
    StableDiffusion3,
    Flux,
    PixArt,
    Sana,
    DiT,
)
SAMPLE = 64  # values of each weight in the fingerprint of a pipeline
_open: dict[int, StableDiffusion] = {}  # the models of `as_model`'s open contexts, by the ids of their pipelines


@contextmanager
def as_model(pipeline: DiffusionPipeline) -> Iterator[StableDiffusion]:
    """The pipeline as a model of its family, whose weights are frozen while the context lasts.

    They share the networks: nothing is loaded, copied or moved, and device, dtype and scheduler are the pipeline's. A
    nested context of one pipeline gives the same model.

    Raises:
        UserError: If no family has such pipelines, or weights are not in memory.
    """
    if id(pipeline) in _open:
        yield _open[id(pipeline)]
        return
    family = next((family for family in FAMILIES if family.generates_with(pipeline)), None)
    if family is None:
        known = ", ".join(cls.__name__ for family in FAMILIES for cls in family.pipelines())
        raise UserError(f"A {type(pipeline).__name__} is of no family that this package knows. Known: {known}.")
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    if any(p.is_meta for part in parts for p in part.parameters()):
        raise UserError(
            f"This {type(pipeline).__name__} loads each weight when it is used (sequential offload), so none can be "
            "edited: pipeline.enable_model_cpu_offload() keeps them in memory."
        )
    training = [part.training for part in parts]
    trainable = [p for part in parts for p in part.parameters() if p.requires_grad]
    dtype = pipeline.vae.dtype
    model = family(
        pipeline,
        name=pipeline.name_or_path or type(pipeline).__name__,
        fingerprint="",
        device=pipeline._execution_device,
    )
    model.fingerprint = _sampled(model)
    _open[id(pipeline)] = model
    try:
        yield model
    finally:
        del _open[id(pipeline)]
        for part, mode in zip(parts, training, strict=True):
            part.train(mode)
        for p in trainable:
            p.requires_grad_(True)
        if pipeline.vae.dtype != dtype:  # a model of SDXL decodes in float32 what overflows in float16
            pipeline.vae.to(dtype)


@contextmanager
def refusing_calls(pipeline: DiffusionPipeline, message: str) -> Iterator[None]:
    """Within it a call of the pipeline raises UserError; the samplers of this package have schedulers of their own."""
    set_timesteps: Callable = pipeline.scheduler.set_timesteps

    @wraps(set_timesteps)
    def refuse(*_: object, **__: object) -> None:
        raise UserError(message)

    pipeline.scheduler.set_timesteps = refuse
    try:
        yield
    finally:
        pipeline.scheduler.set_timesteps = set_timesteps


def _sampled(model: StableDiffusion) -> str:
    """A digest of names, shapes, dtypes and some values of every weight: reading all of them would take long."""

    def some(values: Tensor) -> list[float]:
        if is_traceable_wrapper_subclass(values):  # quantised: codes, scales, ...
            parts, _ = values.__tensor_flatten__()
            return [value for part in parts for value in some(getattr(values, part))]
        return values.detach().flatten()[:: max(1, values.numel() // SAMPLE)].float().tolist()

    return digest([(n, p.shape, str(p.dtype), some(p)) for n, p in model.named_parameters().items()])

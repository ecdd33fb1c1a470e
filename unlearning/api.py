"""One call for a pipeline of diffusers that is in memory: erase(pipe, "cat", method="uce")."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, overload

import torch
from diffusers import DiffusionPipeline
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, instantiate
from omegaconf import open_dict
from omegaconf.errors import OmegaConfBaseException

from unlearning.__main__ import CONF, quieten_lightning
from unlearning.concepts import UnlearningTask
from unlearning.config import instances, validation
from unlearning.config.containers import resolved
from unlearning.config.signatures import parameters
from unlearning.config.suggestions import choices, explain, no_such_setting
from unlearning.config.values import Seed, Template
from unlearning.data import prompt
from unlearning.erasures.base import NOT_WRITABLE, Erasure
from unlearning.erasures.composed import composed
from unlearning.errors import UserError, did_you_mean, unknown
from unlearning.methods.base import Method
from unlearning.models.base import Model
from unlearning.models.families import as_model
from unlearning.models.folders import MODELS
from unlearning.models.stable_diffusion import StableDiffusion

PLAIN = (bool, int, float, str, list, tuple, dict, type(None))  # what a config holds


@overload
def erase(
    pipeline: DiffusionPipeline,
    concept: str | Sequence[str] | UnlearningTask,
    *,
    method: str | Method,
    return_erasure: Literal[False] = False,
    **settings: Any,
) -> DiffusionPipeline: ...


@overload
def erase(
    pipeline: DiffusionPipeline,
    concept: str | Sequence[str] | UnlearningTask,
    *,
    method: str | Method,
    return_erasure: Literal[True],
    **settings: Any,
) -> Erasure: ...


def erase(
    pipeline: DiffusionPipeline,
    concept: str | Sequence[str] | UnlearningTask,
    *,
    method: str | Method,
    return_erasure: bool = False,
    after: Erasure | None = None,
    anchor: str | Mapping[str, str] = "",
    retain: Sequence[str] = (),
    synonyms: Sequence[str] | Mapping[str, Sequence[str]] | None = None,
    template: Template = "a photo of the {}",
    seed: Seed = 0,
    **settings: Any,
) -> DiffusionPipeline | Erasure:
    """Erases concepts from a pipeline that is in memory. Nothing is reloaded or copied to disk.

    Args:
        pipeline: A pipeline of any family in models/families.py. Device, dtype and scheduler do not change.
        concept: One name or several, or a whole task (of images: unlearning.data.folder.folder). A task has its own
            anchor, synonyms, retain and template.
        method: A name as on the command line, with the defaults of conf/method, or an instance.
        return_erasure: Whether to return the erasure, and to leave the pipeline unchanged.
        after: An earlier erasure of this pipeline, which is applied during the fit; the result contains both.
        anchor, synonyms: See unlearning.data.prompt.concepts.
        retain: Concepts that the method may use to retain the rest.
        template: How a name becomes a prompt, for methods that have no template of their own.
        seed: The seed of the training.
        settings: Settings of the method: iterations=200, optimizer={"lr": 1e-4}, student=LoRA("attn2").

    Returns:
        The pipeline, with the erasure in its weights: `save_pretrained` then writes a plain folder of diffusers. Or the
        erasure, for `with erasure.applied_to(pipeline):` and `erasure.save(folder)`.

    Raises:
        UserError: For an unknown method or setting, for a value that does not fit, for a pipeline or a task that the
            method cannot work with, and for an erasure that weights cannot hold, if it is not returned.
    """
    words = {"anchor": anchor, "retain": retain, "synonyms": synonyms, "template": template}
    _check(method, after, {**words, "seed": seed, "return_erasure": return_erasure})
    task = _task(concept, words)
    with as_model(pipeline) as model, TemporaryDirectory() as folder:
        chosen = _chosen(method, settings, model, Path(folder))
        if not return_erasure:
            if not (chosen.writable and (after is None or after.writable)):
                raise UserError(NOT_WRITABLE)
            model.require_values(name for name in model.named_parameters() if name.startswith(f"{model.component}."))
        quieten_lightning()
        with _seeded(seed, model.device), after.applied_to(model) if after else nullcontext():
            erasure = chosen.fit(model, task)
        erasure = composed(after, erasure) if after else erasure
        if return_erasure:
            return erasure.made_from(model)
        erasure.write_into(model)
    return pipeline


def _check(method: object, after: object, values: Mapping[str, object]) -> None:
    """Raises UserError for an argument of `erase` that does not fit, as the command line does for its settings."""
    if not isinstance(method, str | Method):
        raise UserError(f"method is {method!r}, neither a name nor an instance: method='uce', or method=UCE(lamb=0.1).")
    if not isinstance(after, Erasure | None):
        raise UserError(f"after is {after!r}, not an erasure: after=Erasure.load('its/folder').")
    accepted, _ = parameters(erase)
    for name, value in values.items():
        validation.check_value(name, value, accepted[name].annotation)


def _task(concept: str | Sequence[str] | UnlearningTask, words: Mapping[str, Any]) -> UnlearningTask:
    """The task itself, or that of a concept in free text. Raises UserError for words beside a whole task."""
    if not isinstance(concept, UnlearningTask):
        return prompt.task(concept, **words)
    accepted, _ = parameters(erase)
    if beside := [name for name, value in words.items() if value != accepted[name].default]:
        raise UserError(f"{beside[0]} is beside a whole task, which has its own: dataclasses.replace(task, ...).")
    validation.check_value("task.template", concept.template, Template)
    return concept


def _chosen(method: str | Method, settings: Mapping[str, Any], model: StableDiffusion, folder: Path) -> Method:
    """The method itself, or one of conf/method with its defaults and these settings.

    Args:
        folder: For what the method keeps while it works.
    """
    own, _ = parameters(erase)
    if not isinstance(method, str):
        if settings:
            first, name = next(iter(settings)), type(method).__name__
            hint = did_you_mean(first, own)
            raise UserError(f"Settings belong to the method itself: method={name}({first}=...).{hint}")
        _check_kind(model, type(method))
        return method
    if method not in (known := choices(CONF, "method")):
        raise unknown("method", method, known)
    chosen = [
        f"method={method}",
        f"model={MODELS[model.pipeline_class.__name__]}",
        "dataset=prompt",
        "evaluator=[]",
        "logger=none",
    ]
    quiet = ["trainer.callbacks=[]", "+trainer.enable_checkpointing=false", "+trainer.logger=false"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=[*chosen, *quiet])
    place = model.device
    devices = 1 if place.type == "cpu" or place.index is None else [place.index]
    cfg.merge_with({"paths": {"store": str(folder), "output_dir": str(folder)}})
    cfg.merge_with({"trainer": {"accelerator": place.type, "devices": devices}})
    existing, _ = parameters(get_class(cfg.method._target_))
    if strange := [name for name in settings if name not in existing]:
        raise UserError(no_such_setting("", strange[0], {*existing, *own}))
    objects = {name: value for name, value in settings.items() if not isinstance(value, PLAIN)}
    try:
        with open_dict(cfg):  # a method's file need not name every argument
            cfg.merge_with({"method": {name: value for name, value in settings.items() if name not in objects}})
        wanted = resolved(cfg.method)
    except OmegaConfBaseException as error:
        raise UserError(explain(error, CONF)) from None
    _check_kind(model, get_class(wanted["_target_"]))
    validation.check(wanted, "method")
    trainers = instances.trainers(wanted, instantiate(cfg.trainer))
    with open_dict(cfg):
        for name in objects:
            cfg.method.pop(name, None)
    return instantiate(cfg.method, **objects, **trainers)


def _check_kind(model: Model, kind: type[Method]) -> None:
    if not isinstance(model, kind.works_on):
        raise UserError(f"{kind.__name__} works on a {kind.works_on.__name__}, not on a {type(model).__name__}.")


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within it torch's generators begin with the seed; afterwards they are what they were."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield

"""Which settings decide a result, in one place: for the names of folders, for what is already done, for tables.

A result depends on groups of settings, and on the results before it: images depend on the erasure, numbers on the
images. A few settings of these groups decide nothing; they are listed in `NEVER`. A setting that is not listed decides.
"""

from collections.abc import Mapping
from typing import Any, Literal

Result = Literal["erasure", "images", "numbers", "folder"]
GROUPS: dict[Result, tuple[str, ...]] = {  # in the order of the stages, each with the top-level settings that it adds
    "erasure": ("model", "dataset", "method", "trainer", "seed", "after"),
    "images": ("sampler",),
    "numbers": ("attack", "evaluator"),  # attacked images are further images, beside those of the same erasure
    "folder": ("title", "logger", "paths"),  # what else a run leaves: logs, the erasure's README, links between files
}
NEVER = {  # at any depth: so is the sampler of images that a method learns from
    "device",  # images do not depend on it; a training on another device is like one of another seed
    "store",  # where a method keeps images: they are named by all that they depend on
    "model.attention_slicing",
    "model.compile",
    "model.gradient_checkpointing",
    "model.offload",
    "dataset.source",  # text of an error message
    "sampler.batch_size",  # each image has a generator of its own; a method's batch_size does decide
    "trainer.accelerator",  # the number of devices does decide: each process reuses trajectories of its own
    "trainer.callbacks",  # checkpoints and progress bars
    "trainer.default_root_dir",
    "trainer.detect_anomaly",
    "trainer.enable_autolog_hparams",
    "trainer.enable_checkpointing",
    "trainer.enable_model_summary",
    "trainer.enable_progress_bar",
    "trainer.log_every_n_steps",
    "trainer.logger",
    "trainer.model_registry",
    "trainer.num_sanity_val_steps",  # no method validates
    "trainer.profiler",
}


def groups(result: Result = "images") -> tuple[str, ...]:
    """The names of the top-level settings that `result` depends on.

    Args:
        result: "erasure", "images" (default), "numbers" or "folder" (all that a run leaves on disk).
    """
    stages = list(GROUPS)
    return tuple(name for stage in stages[: stages.index(result) + 1] for name in GROUPS[stage])


def decides(name: str, result: Result = "images") -> bool:
    """Whether `result` depends on the setting `name`.

    Args:
        name: A dotted name ("sampler.steps"), or the name of a choice as Hydra writes it ("student@method.student").
        result: As for `groups`.
    """
    names = name.rpartition("@")[2].split(".")
    parts = {".".join(names[i:j]) for i in range(len(names)) for j in range(i + 1, len(names) + 1)}
    return names[0] in groups(result) and (names[0] == "paths" or NEVER.isdisjoint(parts))


def decisive(settings: Mapping[str, Any], result: Result = "images") -> dict[str, Any]:
    """Those of `settings` that `result` depends on, in nested dictionaries.

    Args:
        settings: The settings of a run, resolved or not, in nested mappings.
        result: As for `groups`.
    """
    return {name: _decisive(value, name, result) for name, value in settings.items() if decides(name, result)}


def _decisive(value: Any, path: str, result: Result) -> Any:
    if isinstance(value, Mapping):
        inner = {key: f"{path}.{key}" for key in value}
        return {key: _decisive(value[key], name, result) for key, name in inner.items() if decides(name, result)}
    if isinstance(value, list):
        return [_decisive(item, path, result) for item in value]
    return value

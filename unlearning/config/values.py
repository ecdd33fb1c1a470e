"""Annotations for arguments that limit the values of a config: ranges of numbers, templates. validation.py checks them.

Every number is finite, whatever its range.
"""

from collections.abc import Callable, Collection, Mapping
from string import Formatter
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, AllowInfNan

Count = Annotated[int, Ge(1)]
Several = Annotated[int, Ge(2)]
Natural = Annotated[int, Ge(0)]
Seed = Annotated[int, Ge(0), Le(2**32 - 1)]  # what NumPy accepts
Steps = Annotated[int, Ge(1), Le(1000)]  # of sampling: models are trained at a thousand timesteps
Timestep = Annotated[int, Ge(0), Le(1000)]
Finite = Annotated[float, AllowInfNan(False)]
NonNegative = Annotated[float, Ge(0)]
Positive = Annotated[float, Gt(0)]
Share = Annotated[float, Ge(0), Le(1)]
Part = Annotated[float, Gt(0), Le(1)]  # a share that is not zero


def _with_fields(*fields: str, possible: Collection[str] = ()) -> Callable[[str], str]:
    def check(template: str) -> str:
        wanted = " and ".join(f"{{{field}}}" for field in fields)
        try:
            present = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
        except ValueError:  # a brace without its other half
            present = ["{"]
        if set(present) - set(possible) != set(fields):
            raise ValueError(f"text with {wanted} in it, and no other braces")
        return template

    return check


Template = Annotated[str, AfterValidator(_with_fields(""))]  # a name goes in the place of {}
ConceptTemplate = Annotated[str, AfterValidator(_with_fields("concept", possible=["subject"]))]
SubjectTemplate = Annotated[str, AfterValidator(_with_fields("subject"))]
StyledTemplate = Annotated[str, AfterValidator(_with_fields("object", "style"))]

Stage = Literal["fit", "attack", "generate", "evaluate", "report"]  # of a run, in their order

# Settings at the top of a config, which no class has.
TOP: Mapping[str, Any] = {
    "seed": Seed,
    "stages": list[Stage],
    "title": str,
    "after": str | list[str] | None,
    "objective": str | list[str] | None,
}

# Ranges for arguments of other libraries' classes, by argument name: their signatures have no ranges.
FOREIGN: Mapping[str, Any] = {
    "lr": Positive,
    "betas": tuple[Annotated[float, Ge(0), Lt(1)], Annotated[float, Ge(0), Lt(1)]],
    "eps": NonNegative,
    "weight_decay": NonNegative,
    "momentum": NonNegative,
    "num_warmup_steps": Natural,
    "num_training_steps": Count,
    "num_cycles": Count,
    "start_factor": Part,
    "end_factor": Share,
    "total_iters": Count,
    "accumulate_grad_batches": Count,
    "gradient_clip_val": NonNegative | None,
    "num_nodes": Count,
    "log_every_n_steps": Natural,
    "num_sanity_val_steps": Annotated[int, Ge(-1)],
    "every_n_train_steps": Natural | None,
    "every_n_epochs": Natural | None,
    "save_top_k": Annotated[int, Ge(-1)],
    "refresh_rate": Natural,
}

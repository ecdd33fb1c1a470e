"""Checks a config against the signatures of the classes and functions that it configures, before any is called.

Hydra refuses an override of a setting that does not exist. But a file may add any setting to a config, and any setting
may have a value of the wrong type. Both are reported here, with the nearest name.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from inspect import Parameter
from pathlib import Path
from typing import Any, TypeGuard

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_class, get_method, get_object
from omegaconf import DictConfig, OmegaConf
from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import CoreConfig, SchemaValidator

from unlearning.config.containers import as_written
from unlearning.config.quoting import typed
from unlearning.config.signatures import parameters
from unlearning.config.suggestions import no_such_setting, not_chosen
from unlearning.config.values import FOREIGN, TOP
from unlearning.errors import UserError, nearest

NAMED_LISTS = ("attack", "evaluator", "logger")  # groups of which a run has any number, each under its file's name
UNCHECKED = ("paths", "judge")  # groups whose settings other groups refer to, and which build nothing themselves
STRICT = ("int", "float", "bool")  # pydantic would make 3 of "3", and True of 1 or "yes"
NAMING = (get_class, get_method, get_object)  # Hydra's, for settings that are a class or a function themselves
BOUNDS = {"ge": "of at least", "gt": "greater than", "le": "of at most", "lt": "less than"}
OF_NUMBERS = ("int", "float", "finite", "greater", "less")  # how the names of pydantic's errors about numbers begin
LISTS = ("list_type", "tuple_type", "set_type", "frozen_set_type", "sequence_str")


def check_names(cfg: DictConfig, conf: Path) -> None:
    """Checks the names that no signature knows: those at the top of a config, and those of groups that build nothing.

    A name that another setting refers to as ${name} is the user's own, and accepted.

    Args:
        cfg: The composed config.
        conf: The folder of the configuration.

    Raises:
        UserError: For a name that no file in `conf` has.
    """
    _check_chosen_twice()
    raw = as_written(cfg)
    existing = {*_names(conf / "config.yaml"), *(p.name for p in conf.iterdir() if p.is_dir()), *_choices()}
    for group, choice in _choices().items():
        if (file := conf / group / f"{choice}.yaml").exists() and "@package _global_" in file.read_text():
            existing |= {*_names(file)} if group != "experiment" else set()
    _check_names("", raw, existing, raw)
    for group in UNCHECKED:
        files = (conf / group).glob("*.yaml")
        _check_names(group, raw.get(group) or {}, {name for file in files for name in _names(file)}, raw)
    for group in NAMED_LISTS:
        ours, nodes = {file.stem for file in (conf / group).glob("*.yaml")}, raw.get(group) or {}
        for name in (name for name, node in nodes.items() if "_target_" not in (node or {})):
            _check_names(group, [name], ours, raw)
            chosen = [other for other in nodes if other != name]
            raise UserError(not_chosen(group, name, chosen))


def _check_chosen_twice() -> None:
    """Raises UserError for two variants of one evaluator or attack, of which Hydra would keep only the last."""
    typed = HydraConfig.get().overrides.task if HydraConfig.initialized() else ()
    for override in OverridesParser.create().parse_overrides(list(typed)):
        group, chosen = override.key_or_group, override.value()
        first: dict[str, str] = {}
        for name in map(str, chosen) if group in NAMED_LISTS and isinstance(chosen, list) else ():
            kind = name.partition("/")[0]
            if first.setdefault(kind, name) != name:
                raise UserError(
                    f"`{first[kind]}` and `{name}` are one {group}, {kind}, with other settings; a run has it once. "
                    "NudeNet's boxes can be counted by another rule afterwards: "
                    "python -m unlearning.evaluators.nudenet --help."
                )


def _choices() -> Mapping[str, str]:
    return HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}


def _names(file: Path) -> Iterator[str]:
    return (str(name) for name in OmegaConf.load(file) if name != "defaults")


def _check_names(path: str, names: Iterable[str], existing: Iterable[str], whole: object) -> None:
    for name in names:
        if name not in existing and not re.search(rf"\$\{{{re.escape(f'{path}.{name}'.strip('.'))}\b", str(whole)):
            raise UserError(no_such_setting(path, name, existing))


def check_text(settings: object, path: str = "") -> None:
    """Checks that every text in the settings can be written to a file: a lone surrogate is half a character.

    Args:
        settings: Resolved or not.
        path: The dotted name of `settings` in the config.

    Raises:
        UserError: For the first setting with such a character.
    """
    if isinstance(settings, Mapping):
        for name, value in settings.items():
            check_text(name, path)
            check_text(value, f"{path}.{name}" if path else str(name))
    elif isinstance(settings, list):
        for i, value in enumerate(settings):
            check_text(value, f"{path}.{i}")
    elif isinstance(settings, str) and (bad := re.search("[\ud800-\udfff]", settings)):
        raise UserError(f"`{path}` holds the character {bad[0]!a}, which no text can have.")


def check_top(settings: Mapping) -> None:
    """Checks the settings at the top of a config, which no signature has.

    Raises:
        UserError: For a value of another type, out of its range, or not among the choices.
    """
    for name, hint in TOP.items():
        if name in settings:
            check_value(name, settings[name], hint)


def check(settings: object, path: str = "") -> None:
    """Compares every part of the settings that has a `_target_` with the signature of that target.

    Args:
        settings: Resolved settings.
        path: The dotted name of `settings` in the config.

    Raises:
        UserError: For the first setting that its target does not know, needs, or takes with a value of another type.
    """
    if _is_built(settings) and (target := _target(settings["_target_"], f"{path}._target_")):
        _check_against(target, settings, path)
        if target in NAMING:
            _target(str(settings.get("path")), f"{path}.path")
    children: Iterable[tuple[object, object]] = ()
    if isinstance(settings, Mapping):
        children = settings.items()
    elif isinstance(settings, list):
        children = enumerate(settings)
    for name, child in children:
        check(child, f"{path}.{name}" if path else str(name))


def _is_built(value: object) -> TypeGuard[Mapping]:
    return isinstance(value, Mapping) and isinstance(value.get("_target_"), str)


def _target(name: str, path: str) -> Callable | None:
    """The object called `name`, the value of the setting `path`. Raises UserError if it cannot be imported."""
    try:
        return get_object(name)
    except (ImportError, ValueError) as error:
        if path.startswith("logger."):
            return None  # the run warns, and goes on without it
        why = (str(error).splitlines() or [type(error).__name__])[-1]
        raise UserError(f"`{path}` is {name}, which cannot be imported. {why}") from None


def _check_against(target: Callable, settings: Mapping, path: str) -> None:
    accepted, complete = parameters(target)
    given = {name: value for name, value in settings.items() if not name.startswith("_")}
    for name, value in given.items():
        full = f"{path}.{name}"
        if name not in accepted:
            if complete or nearest(name, accepted, cutoff=0.8):  # otherwise it may be meant for what **keywords go to
                raise UserError(no_such_setting(path, name, accepted))
        elif value == "???":
            if not is_trainer_of_method(full):
                raise UserError(f"`{full}` has no value. Give it one: `{full}=...`.")
        else:
            check_value(full, value, hint_of(target, accepted[name]))
    missing = [name for name, p in accepted.items() if p.default is Parameter.empty and name not in given]
    if missing and complete and not settings.get("_partial_") and "_args_" not in settings:
        raise UserError(f"{path} needs the setting `{missing[0]}`, which has no value.")


def hint_of(target: Callable, parameter: Parameter) -> Any:
    """The type of a parameter, with its range: its annotation, or for other libraries' numbers what FOREIGN says."""
    ours = (target.__module__ or "").partition(".")[0] == __package__.partition(".")[0]
    return parameter.annotation if ours else FOREIGN.get(parameter.name, parameter.annotation)


def is_trainer_of_method(path: str) -> bool:
    """Whether a dotted name is that of a method's trainer, or of a stage's: the command line fills these in."""
    first, *_, last = path.split(".")
    return (first, last) == ("method", "trainer")


def check_value(name: str, value: object, hint: Any) -> None:
    """Compares the value of a setting with a type hint and its range, Annotated[int, Ge(1)], as pydantic reads them.

    A number is accepted as text (a concept may be called 1984), text as a path or an enum, and a list as any sequence.
    Text is not accepted as a number, a number not as a boolean, and an infinite number not at all. Values that Hydra
    instantiates are not checked, and neither are hints that pydantic does not understand.

    Args:
        name: The dotted name of the setting.

    Raises:
        UserError: If the value does not fit.
    """
    if _is_built(value) or (schema := _schema(hint)) is None:
        return
    try:
        SchemaValidator(schema, CoreConfig(coerce_numbers_to_str=True)).validate_python(_without_built(value))
    except ValidationError as error:
        raise UserError(_explain(name, value, error, schema)) from None


def _schema(hint: Any) -> Any:
    """Pydantic's schema for a type hint; None if it does not understand `hint`."""
    try:
        adapter: TypeAdapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except (PydanticUserError, NameError, TypeError):
        return None
    if not adapter.pydantic_complete:  # the hint names a type that only a type checker can resolve
        return None
    return _with_strict_numbers(adapter.core_schema)


def _with_strict_numbers(schema: Any) -> Any:
    if isinstance(schema, Mapping):
        inner = {key: _with_strict_numbers(value) for key, value in schema.items()}
        finite = {"allow_inf_nan": False} if schema.get("type") == "float" else {}
        return inner | {"strict": True, **finite} if schema.get("type") in STRICT else inner
    if isinstance(schema, list | tuple):
        return type(schema)(map(_with_strict_numbers, schema))
    return schema


def _ranges(schema: Any) -> Iterator[str]:
    """Each range in a schema in words: "a whole number of at least 1"."""
    if isinstance(schema, Mapping) and not BOUNDS.keys().isdisjoint(schema):
        kind = "a whole number" if schema.get("type") == "int" else "a number"
        if {"ge", "le"} <= schema.keys():
            yield f"{kind} from {schema['ge']} to {schema['le']}"
        else:
            yield f"{kind} " + " and ".join(f"{text} {schema[key]}" for key, text in BOUNDS.items() if key in schema)
    elif isinstance(schema, Mapping | list | tuple):
        for inner in schema.values() if isinstance(schema, Mapping) else schema:
            yield from _ranges(inner)


def _without_built(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_built(inner) for key, inner in value.items() if not _is_built(inner)}
    if isinstance(value, list):
        return [_without_built(inner) for inner in value if not _is_built(inner)]
    return value


def _explain(name: str, value: object, error: ValidationError, schema: Any) -> str:
    errors, setting, given = error.errors(), name, value
    if len(errors) == 1 and (inner := errors[0]["loc"]):  # an entry of a list or a mapping
        name, value = ".".join(map(str, (name, *inner))), errors[0]["input"]
    kinds = [e for e in errors if e["type"] != "is_instance_of"] or errors  # a config cannot hold a tensor
    wanted: dict[str, None] = {}
    for e in kinds:
        ranges = list(_ranges(schema)) if e["type"].startswith(OF_NUMBERS) else []
        text = "a list" if e["type"] in LISTS else re.sub("^(Input should be|Value error,) ", "", e["msg"])
        text = text.replace("a valid string", "text")
        wanted |= dict.fromkeys(ranges or [text])
    message = f"`{name}` has to be {' or '.join(wanted)}, and is {'null' if value is None else repr(value)}."
    if [*wanted] == ["a list"] and isinstance(given, str | int | float):
        message += f" Type {typed(setting, [given])}"
    return message

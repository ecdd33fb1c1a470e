"""Whether what a config says is known to what it configures, before any of it is built.

Hydra refuses an override of a setting that is not there. But a file may add any setting to a config, and a setting may
be given a value of another kind: both are found here, by the signatures of what is built.
"""

import ast
import inspect
import re
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from difflib import get_close_matches
from enum import Enum
from functools import reduce
from pathlib import Path, PurePath
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

from unlearning.config.suggestions import did_you_mean
from unlearning.errors import UserError

KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", types.NoneType: "null"}
LATER = {"method.trainer"}  # given by the command line itself


def check_names(cfg: DictConfig, conf: Path) -> None:
    """Raises UserError for a name that no file of `conf` has, at the top of the config or in a group without _target_.

    A name that another setting refers to (${name}) is the user's own.
    """
    _check_evaluators()
    raw = OmegaConf.to_container(cfg, resolve=False)
    known = {*_names(conf / "config.yaml"), *(p.name for p in conf.iterdir() if p.is_dir()), *_choices()}
    for group, choice in _choices().items():
        if (file := conf / group / f"{choice}.yaml").exists() and "@package _global_" in file.read_text():
            known |= {*_names(file)} if group != "experiment" else set()
    _check_names("", raw, known, raw)
    for group in ("paths", "judge"):
        _check_names(
            group, raw.get(group) or {}, {n for file in (conf / group).glob("*.yaml") for n in _names(file)}, raw
        )
    for group in ("evaluator", "logger"):
        ours, nodes = {file.stem for file in (conf / group).glob("*.yaml")}, raw.get(group) or {}
        for name in (name for name, node in nodes.items() if "_target_" not in (node or {})):
            _check_names(group, [name], ours, raw)
            chosen = [other for other in nodes if other != name]
            raise UserError(
                f"The {group} `{name}` is not part of this run. Choose it too: `{group}=[{','.join([*chosen, name])}]`."
            )


def _check_evaluators() -> None:
    """Raises UserError where two papers' rules are chosen for one evaluator, of which Hydra lets the last one win."""
    told = HydraConfig.get().overrides.task if HydraConfig.initialized() else ()
    for override in OverridesParser.create().parse_overrides(list(told)):
        chosen, first = override.value(), {}
        for name in chosen if override.key_or_group == "evaluator" and isinstance(chosen, list) else ():
            kind = str(name).partition("/")[0]
            if first.setdefault(kind, name) != name:
                raise UserError(
                    f"`{first[kind]}` and `{name}` are one evaluator, {kind}, by two protocols; a run has it once. "
                    "NudeNet's boxes are counted by another rule afterwards: "
                    "python -m unlearning.evaluators.nudenet --help."
                )


def _choices() -> Mapping[str, str]:
    return HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}


def _names(file: Path) -> Iterator[str]:
    return (str(name) for name in OmegaConf.load(file) if name != "defaults")


def _check_names(path: str, names: Iterable[str], known: set[str], whole: object) -> None:
    for name in names:
        if name not in known and not re.search(rf"\$\{{{re.escape(f'{path}.{name}'.strip('.'))}\b", str(whole)):
            raise UserError(_no_such_setting(path, name, known))


def _no_such_setting(path: str, name: str, known: Iterable[str]) -> str:
    text = f"{path} has no setting `{name}`." if path else f"There is no setting `{name}`."
    return text + (did_you_mean(name, known) or f" Settings: {', '.join(sorted(known))}.")


def check(settings: object, path: str = "") -> None:
    """Raises UserError for the first setting that what it configures does not know, needs, or takes in this kind.

    Args:
        settings: Resolved settings. Whatever has a _target_ is compared with that one's signature.
        path: The dotted name of where they stand.
    """
    if isinstance(settings, Mapping) and isinstance(settings.get("_target_"), str):
        _check_against(_located(settings["_target_"], path), settings, path)
    children = (
        settings.items() if isinstance(settings, Mapping) else enumerate(settings) if isinstance(settings, list) else ()
    )
    for name, child in children:
        check(child, f"{path}.{name}" if path else str(name))


def _located(target: str, path: str) -> Callable | None:
    try:
        return get_object(target)
    except (ImportError, ValueError) as error:
        if path.startswith("logger."):
            return None  # one that cannot be built is left out
        why = (str(error).splitlines() or [type(error).__name__])[-1]
        raise UserError(f"`{path}._target_` is {target}, which cannot be found. {why}") from None


def _check_against(target: Callable | None, settings: Mapping, path: str) -> None:
    known, complete = parameters(target)
    given = {name: value for name, value in settings.items() if not name.startswith("_")}
    for name, value in given.items():
        full = f"{path}.{name}"
        if name not in known:
            if complete or get_close_matches(name, known, cutoff=0.8):  # a near miss is meant for nobody else
                raise UserError(_no_such_setting(path, name, known))
        elif value == "???":
            if full not in LATER:
                raise UserError(f"`{full}` has no value. Give it one: `{full}=...`.")
        elif not (value is None or isinstance(value, Mapping) or accepts(known[name].annotation, value)):
            raise UserError(f"`{full}` has to be {_wanted(known[name].annotation)}, and is {value!r}.")
    needed = [name for name, p in known.items() if p.default is p.empty and name not in given]
    if needed and complete and not settings.get("_partial_") and "_args_" not in settings:
        raise UserError(f"{path} needs the setting `{needed[0]}`, which has no value.")


def parameters(target: Callable | None) -> tuple[dict[str, inspect.Parameter], bool]:
    """What a function or a class may be given by name, and whether that is all.

    A class passes the rest on to its parents, a function to what it calls with it. Annotations are types, or Any where
    they cannot be told.
    """
    is_class, known = inspect.isclass(target), {}
    layers = [c.__init__ for c in target.__mro__[:-1] if "__init__" in vars(c)] if is_class else [target]
    for layer in layers:
        try:
            signature = list(inspect.signature(layer).parameters.values())[is_class:]
        except (TypeError, ValueError):
            return known, False
        hints: dict[str, Any] = {}
        with suppress(Exception):  # a hint may name anything
            hints = typing.get_type_hints(layer)
        named = [p for p in signature if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        known = {p.name: p.replace(annotation=hints.get(p.name, Any)) for p in named} | known
        rest = next((p.name for p in signature if p.kind is p.VAR_KEYWORD), None)
        if rest is None:
            return known, True
    receiver = None if is_class else _receiver(target, rest)
    if receiver is None:
        return known, not layers  # a class without an __init__ takes nothing
    passed, complete = parameters(receiver)  # and what that needs the function may give it
    return {name: p.replace(default=None) for name, p in passed.items()} | known, complete


def _receiver(function: Callable, rest: str) -> Callable | None:
    """What the source of a function calls with `**rest`: f(**rest), module.f(**rest) or super().f(**rest).

    None where that is not one thing that can be told.
    """
    try:
        source = ast.parse(textwrap.dedent(inspect.getsource(function)))
        [called] = {
            ast.unparse(call.func)
            for call in ast.walk(source)
            if isinstance(call, ast.Call) and any(k.arg is None and ast.unparse(k.value) == rest for k in call.keywords)
        }
        names = inspect.getclosurevars(function)
        start, *attributes = called.split(".")
        if start == "super()":
            return getattr(super(names.nonlocals["__class__"], function.__self__), *attributes)
        return reduce(getattr, attributes, {**names.builtins, **names.globals, **names.nonlocals}[start])
    except (OSError, SyntaxError, TypeError, ValueError, LookupError, AttributeError):
        return None


def accepts(hint: Any, value: object) -> bool:
    """Whether a value of a config may be given where `hint` is asked for; yes, wherever that cannot be told."""
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(accepts(one, value) for one in inner)
    if origin is typing.Literal:
        return value in inner
    if origin in (int, float):
        return isinstance(value, int if origin is int else int | float) and not isinstance(value, bool)
    if origin in (Any, Callable) or not inspect.isclass(origin):
        return True
    if isinstance(value, list):
        each = inner[0] if len(inner) == 1 or (len(inner) == 2 and inner[1] is ...) else Any
        takes = issubclass(list, origin) or issubclass(origin, tuple | set)
        return takes and all(isinstance(v, Mapping) or accepts(each, v) for v in value)
    if origin is str:
        return isinstance(value, str | int | float)  # a concept may be called 1984
    return (isinstance(value, str) and issubclass(origin, PurePath | Enum)) or isinstance(value, origin)


def _wanted(hint: Any) -> str:
    """The hint in words."""
    origin, inner = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        words = dict.fromkeys(map(_wanted, inner))
        return " or ".join(word for word in words if "tensor" not in word.lower())
    if origin is typing.Literal:
        return " or ".join(map(repr, inner))
    if inspect.isclass(origin) and issubclass(origin, list | tuple | set):
        return "a list"
    return KINDS.get(origin, f"a {getattr(origin, '__name__', origin)}")

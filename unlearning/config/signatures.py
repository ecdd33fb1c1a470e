"""The keyword arguments that a class or a function accepts, according to its signature."""

import inspect
import typing
from collections.abc import Callable
from inspect import Parameter, Signature
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable)
NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)


def forwards_to(receiver: Callable) -> Callable[[F], F]:
    """Decorates a function that forwards its **keywords to `receiver`: its signature shows the receiver's parameters.

    A parameter of the function hides the receiver's parameter of the same name.
    """

    def decorate(function: F) -> F:
        own = [p for p in _signature(function).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        names = {p.name for p in own}
        more = [p for p in _signature(receiver).parameters.values() if p.kind in NAMED and p.name not in names]
        more = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in more]
        function.__signature__ = Signature([*own, *more])  # type: ignore[attr-defined]
        return function

    return decorate


def parameters(target: Callable) -> tuple[dict[str, Parameter], bool]:
    """The keyword arguments that `target` accepts, and whether it accepts no others.

    A class whose `__init__` has **keywords also accepts the parameters of its parent classes. A function declares its
    **keywords by `functools.wraps`, by `forwards_to`, or by `**keywords: Unpack[SomeTypedDict]`; otherwise it may
    accept anything.

    Returns:
        The parameters by name, with types for annotations (Any where they are unknown), and whether these are all.
    """
    accepted: dict[str, Parameter] = {}
    is_class, layers = False, [target]
    if inspect.isclass(target):
        is_class, layers = True, [vars(c)["__init__"] for c in target.__mro__[:-1] if "__init__" in vars(c)]
    for layer in layers:
        try:
            own = list(_signature(layer).parameters.values())[is_class:]
        except (TypeError, ValueError):  # of a class or a function written in C
            return accepted, False
        accepted = {p.name: _typed(p) for p in own if p.kind in NAMED} | accepted
        keywords = next((p for p in own if p.kind is Parameter.VAR_KEYWORD), None)
        if keywords is None:
            return accepted, True
        if typing.get_origin(keywords.annotation) is typing.Unpack:
            return _unpacked(typing.get_args(keywords.annotation)[0]) | accepted, True
    return accepted, not layers  # a class without any __init__ takes nothing


def _signature(function: Callable) -> Signature:
    try:
        return inspect.signature(function, eval_str=True)
    except NameError:  # an annotation that only a type checker can resolve
        return inspect.signature(function)


def _typed(parameter: Parameter) -> Parameter:
    unknown = parameter.annotation is Parameter.empty or isinstance(parameter.annotation, str)
    return parameter.replace(annotation=Any) if unknown else parameter


def _unpacked(keys: type) -> dict[str, Parameter]:
    """The keys of a TypedDict as parameters."""
    hints = typing.get_type_hints(keys, include_extras=True)
    defaults = {name: Parameter.empty for name in keys.__required_keys__}  # type: ignore[attr-defined]
    return {
        name: Parameter(name, Parameter.KEYWORD_ONLY, annotation=hint, default=defaults.get(name))
        for name, hint in hints.items()
    }

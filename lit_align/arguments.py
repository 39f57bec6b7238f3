"""Checks of the arguments of constructors, by their annotations, for use in Python without the command line.

Some values may be given in place of others: a path object for a string, a mapping for a dataclass, `torch.bfloat16` for
its name. Any other value of a wrong type is refused before `__init__` runs.
"""

import inspect
import numbers
import os
import re
from abc import ABCMeta
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

from lit_align.dtypes import dtype_name
from lit_align.errors import UserError, shown

T = TypeVar("T")


class CheckedArguments(ABCMeta):
    """Metaclass of classes whose arguments are checked.

    A class may give, by argument, `argument_fixes`, the fix that the message names for a wrong value, and
    `argument_conversions`, which convert a value before it is checked.
    """

    argument_fixes: dict[str, str] = {}  # noqa: RUF012
    argument_conversions: dict[str, Callable[[Any], Any]] = {}  # noqa: RUF012

    def __call__(cls: type[T], *args: Any, **kwargs: Any) -> T:
        assert isinstance(cls, CheckedArguments)
        made, expected = cls, _annotations(cls)
        names = [*inspect.signature(cls).parameters][: len(args)]
        positional = [_checked(made, name, value, expected) for name, value in zip(names, args, strict=False)]
        named = {name: _checked(made, name, value, expected) for name, value in kwargs.items()}
        return super().__call__(*positional, *args[len(positional) :], **named)  # type: ignore[misc]

    @property
    def __signature__(cls) -> inspect.Signature:
        """The signature of `__init__`, which `help` and editors show."""
        signature = inspect.signature(cls.__init__)  # type: ignore[misc]
        return signature.replace(parameters=list(signature.parameters.values())[1:])


class _Misfit(Exception):
    """The value does not have the type."""


def _annotations(cls: type) -> dict[str, Any]:
    """The annotations of all arguments, those included that `**kwargs` passes on to base classes."""
    found: dict[str, Any] = {}
    for base in cls.__mro__:
        if (init := vars(base).get("__init__")) is None:
            continue
        with suppress(NameError, TypeError):  # annotations that name nothing are not checked
            found = get_type_hints(init) | found
        if all(each.kind is not each.VAR_KEYWORD for each in inspect.signature(init).parameters.values()):
            break
    return found


def _checked(cls: CheckedArguments, name: str, value: Any, expected: Mapping[str, Any]) -> Any:
    """The value of an argument, converted.

    Raises:
        UserError: it has a wrong type; names the argument, the value and the type.
    """
    convert = cls.argument_conversions.get(name)
    try:
        return _fitted(convert(value) if convert else value, expected.get(name, Any))
    except _Misfit:
        plain = isinstance(value, str | int | float | list | dict | None)
        given = f"{name}={shown(value)}" if plain else f"{name}, of type {type(value).__name__},"
        fix = cls.argument_fixes.get(name, "Change it.")
        raise UserError(f"{cls.__name__}: {given} must be {_described(expected[name])}. {fix}") from None


def _fitted(value: Any, expected: Any) -> Any:
    """The value as it is, or converted.

    Raises:
        _Misfit: it does not have the type.
    """
    origin, parts = get_origin(expected), get_args(expected)
    if origin in (Union, UnionType):
        return _fitted_to_any(value, parts)
    if origin is Literal:
        name = dtype_name(value) if isinstance(value, torch.dtype) else value
        _need(any(type(each) is type(name) and each == name for each in parts))
        return name
    if origin is Callable:
        _need(callable(value))
        return value
    kind = NoneType if expected is None else origin or expected
    if kind in (Any, object) or not isinstance(kind, type):  # a type variable, a name
        return value
    return _fitted_to_class(value, kind, parts)


def _fitted_to_class(value: Any, kind: type, parts: Sequence[Any]) -> Any:
    """As `_fitted`, for a class and its parameters."""
    if kind is str and isinstance(value, os.PathLike):
        return os.fspath(value)
    if kind in (list, Sequence) and isinstance(value, list | tuple):
        return [_fitted(each, *parts) for each in value] if parts else list(value)
    if kind in (dict, Mapping) and isinstance(value, Mapping):
        key, item = parts or (Any, Any)
        return {_fitted(name, key): _fitted(each, item) for name, each in value.items()}
    if is_dataclass(kind) and isinstance(value, Mapping):
        return _made(kind, value)
    if kind in (int, float):
        kind = numbers.Integral if kind is int else numbers.Real
        _need(not isinstance(value, bool))
    if kind is Sequence:
        _need(not isinstance(value, str))
    if not getattr(kind, "_is_protocol", False) or getattr(kind, "_is_runtime_protocol", False):
        _need(isinstance(value, kind))
    return value


def _fitted_to_any(value: Any, types: Iterable[Any]) -> Any:
    for each in types:
        try:
            return _fitted(value, each)
        except _Misfit:
            continue
    raise _Misfit


def _need(fits: bool) -> None:
    if not fits:
        raise _Misfit


def _made(kind: type, values: Mapping[str, Any]) -> Any:
    known = [each.name for each in fields(kind)]  # type: ignore[arg-type]
    if unknown := next((name for name in values if name not in known), None):
        raise UserError(f"{kind.__name__} has no field {unknown!r}. Its fields are: {', '.join(known)}.")
    return kind(**values)


def _described(expected: Any) -> str:
    """An annotation without the modules of its types."""
    if get_origin(expected) is Literal:
        return " | ".join(map(repr, get_args(expected)))
    if get_origin(expected) in (Union, UnionType):
        return " | ".join(map(_described, get_args(expected)))
    return "None" if expected is NoneType else re.sub(r"[\w.]+\.(?=\w)", "", inspect.formatannotation(expected))

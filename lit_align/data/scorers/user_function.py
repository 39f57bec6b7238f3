"""A user's function: found by its import path, called as its arguments ask for, and identified by its code."""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from lit_align.data.formats.rows import listing
from lit_align.data.scorers.base import asks_to_end, fingerprint_of, line_of
from lit_align.data.scorers.call_form import CallForm
from lit_align.data.scorers.row_columns import RowColumns
from lit_align.errors import UserError
from lit_align.files import digest

_IMPORTED: dict[str, str] = {}
"""Fingerprint of each imported module's file when it was run."""


class UserFunction:
    """A function with the way to call it, and the columns that it reads.

    Args:
        given: The function, or the import path of one.
        form: How it is called, and what it returns; `score` and `compare` check that.
        columns: Those that may be further arguments.

    Raises:
        UserError: there is none, or it cannot be called with prompts, responses and these columns.
    """

    def __init__(self, given: str | Callable[..., Any], form: str, columns: RowColumns):
        self.function = _import_function(given) if isinstance(given, str) else given
        path = given if isinstance(given, str) else None
        self._form = _form_of(self.function, path or _name_of(self.function), form, columns)
        self.columns = columns
        columns.keep(self._form.columns)
        self.identity = _identity_of(self.function, path) + columns.identity

    def __call__(self, prompts: Any, responses: Any, columns: dict[str, Any]) -> Any:
        return self._form.call(self.function, prompts, responses, columns)


def _form_of(function: Callable[..., Any], name: str, form: str, columns: RowColumns) -> CallForm:
    found = CallForm.of(function, columns.names)
    if found is None and columns.names:
        raise UserError(
            f"scorer.function={name!r} must be {form}, with further arguments that are columns of {columns.source}: "
            f"{listing(columns.names)}. Change its arguments."
        )
    if found is None:
        raise UserError(
            f"scorer.function={name!r} must take two arguments: {form}. A prompt is a string, or a list of messages "
            "where the data are chats. Change its arguments. For columns of the data, such as an answer, set "
            "scorer.rows."
        )
    if columns.names and not found.columns:
        raise UserError(
            f"scorer.rows has no effect because {name!r} takes none of the columns {listing(columns.names)}. Add one "
            "to its arguments, or leave scorer.rows out."
        )
    return found


def _import_function(path: str) -> Callable[..., Any]:
    """Import package.module.function, or path/to/file.py:function."""
    forms = "Give package.module.function, or path/to/file.py:function."
    place, _, name = path.rpartition(":" if ":" in path else ".")
    if not place or not name:
        raise UserError(f"scorer.function={path!r} must be the import path of a function. {forms}")
    if ":" in path and not Path(place).is_file():
        raise UserError(f"scorer.function={path!r}: there is no file {place!r}. {forms}")
    try:
        module = _import_file(Path(place)) if ":" in path else _import_module(place)
    except BaseException as error:  # whatever the user's file does, sys.exit included
        if asks_to_end(error):
            raise
        fix = forms if isinstance(error, ImportError) else "The error is in its code: fix it, or set what it needs."
        raise UserError(
            f"scorer.function={path!r}: cannot import {place!r} ({type(error).__name__}: {error}{line_of(error)}). "
            f"{fix}"
        ) from error
    function: Any = getattr(module, name, None)
    if function is None:
        raise UserError(f"scorer.function={path!r}: there is no {name!r} in {place!r}. {forms}")
    if not callable(function):
        raise UserError(f"scorer.function={path!r} must be a function, not of type {type(function).__name__}. {forms}")
    return function


def _name_of(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def _identity_of(function: Callable[..., Any], path: str | None) -> str:
    """The path that names a function, or its name, with a fingerprint of its file; of a notebook's, of its code.

    Then a digest of the values that it holds, if any: arguments of a `partial`, defaults of arguments, what a closure
    has taken from around it, attributes of an object.
    """
    if isinstance(function, partial):
        return f"{_identity_of(function.func, path)} {digest(_plain([function.args, function.keywords]))}"
    file = getattr(sys.modules.get(function.__module__ or ""), "__file__", None)
    name = path or _name_of(function)
    kind: Any = type(function)
    called = function if hasattr(function, "__code__") else kind.__call__  # of an object
    code = getattr(called, "__code__", None)
    if file and Path(file).is_file():  # standard input has no file
        name = f"{name}@{fingerprint_of([Path(file)])}"
    elif code is not None and not path:
        name = f"{name}@{digest(_written(code))}"
    defaults = (getattr(called, name, None) for name in ("__defaults__", "__kwdefaults__"))
    held: list[Any] = [values for values in defaults if values]
    for cell in getattr(function, "__closure__", None) or ():
        with suppress(ValueError):  # it is still empty
            held.append(cell.cell_contents)
    owner = getattr(function, "__self__", function)  # of a method
    if getattr(owner, "__dict__", None) and not inspect.ismodule(owner):
        held.append(vars(owner))
    return f"{name} {digest(_plain(held))}" if held else name


def _written(code: CodeType) -> str:
    """What a function's code does, the same in each process: without addresses, and with sets in order."""

    def constant(value: Any) -> str:
        if isinstance(value, CodeType):  # a function within, or a comprehension
            return _written(value)
        return repr(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)

    return repr((code.co_code, [constant(value) for value in code.co_consts], code.co_names))


def _plain(value: Any, around: tuple[int, ...] = ()) -> str:
    """Values that decide what a function computes: numbers and texts as they are, functions by their code, of other
    objects the type.

    Args:
        around: Containers that the value is in. One that holds itself is not read again.
    """
    if id(value) in around:
        return "…"
    around = (*around, id(value))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_plain(each, around)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_plain(each, around) for each in value) + "]"
    if isinstance(value, FunctionType):  # that a decorator calls
        return _written(value.__code__)
    return repr(value) if isinstance(value, bool | int | float | str | None) else type(value).__name__


def _import_module(name: str) -> ModuleType:
    """Import a module; run it again if its file has been edited since."""
    module = importlib.import_module(name)
    file = getattr(module, "__file__", None)
    now = fingerprint_of([Path(file)]) if file else ""
    if _IMPORTED.setdefault(name, now) != now:
        module = importlib.reload(module)
        _IMPORTED[name] = now
    return module


def _import_file(path: Path) -> ModuleType:
    """Run a file once, as a module whose name hides no other module; an edited file, as in a notebook, is run again."""
    version = hashlib.sha256(str(path.resolve()).encode() + path.read_bytes()).hexdigest()[:8]
    name = f"{path.stem}_{version}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module

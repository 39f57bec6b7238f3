"""Scorers that call a user's function."""

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from lit_align.data.formats.rows import Text
from lit_align.data.scorers.base import PairwiseScorer, Scorer, asks_to_end, fingerprint_of, line_of
from lit_align.errors import UserError, check_number
from lit_align.files import digest

_IMPORTED: dict[str, str] = {}
"""Fingerprint of each imported module's file when it was run."""


class FunctionScorer(Scorer):
    """A Python function that returns one number per response: `reward(prompts, responses) -> list[float]`.

    A prompt is a string, or a list of messages with `role` and `content`. An argument called `responses`, or
    `completions` as in TRL, gets the responses wherever it stands: `reward(completions, **kwargs)`.

    Args:
        function: Import path of the function: package.module.function, or path/to/file.py:function. In Python also the
            function itself.
        batch_size: Most responses per call.
    """

    def __init__(self, function: str | Callable[..., Any], batch_size: int = 256):
        check_number("scorer.batch_size", batch_size, least=1)
        self.function = _function_of(function, "reward(prompts, responses) -> list[float], one number per response")
        self.batch_size = batch_size
        self._identity = _identity_of(self.function, function if isinstance(function, str) else None)

    @property
    def identity(self) -> str:
        """The function's name, and fingerprints of the file that holds it, or of its code, and of its own values."""
        return self._identity

    def __call__(self, prompts: Sequence[Text], responses: Sequence[str]) -> Sequence[float]:
        return _call(self.function, [_own(prompt) for prompt in prompts], responses)


class PairwiseFunctionScorer(PairwiseScorer):
    """A Python function that compares K responses: `prefer(prompt, responses)` returns P(i beats j), [K, K].

    Args:
        function: Import path of the function: package.module.function, or path/to/file.py:function. In Python also the
            function itself.
    """

    def __init__(self, function: str | Callable[..., Any]):
        self._function = _function_of(function, "prefer(prompt, responses) -> [K, K], P(i beats j) of K responses")
        self._identity = _identity_of(self._function, function if isinstance(function, str) else None)

    @property
    def identity(self) -> str:
        """The import path and a fingerprint of the file that holds the function."""
        return self._identity

    def preferences(self, prompts: Sequence[Text], responses: Sequence[Sequence[str]]) -> list[Any]:
        return [_call(self._function, _own(prompt), group) for prompt, group in zip(prompts, responses, strict=True)]


def _own(prompt: Text) -> Text:
    """A prompt to which a function may append a response: the others of the prompt are scored without it."""
    return prompt if isinstance(prompt, str) else [{**message} for message in prompt]


def _function_of(function: str | Callable[..., Any], form: str) -> Callable[..., Any]:
    """A function, or the one that an import path names.

    Args:
        form: How it is called, and what it returns; `score` and `compare` check that.

    Raises:
        UserError: there is none, or it cannot be called with prompts and responses.
    """
    found = _import_function(function) if isinstance(function, str) else function
    if not _accepts(found):
        name = function if isinstance(function, str) else _name_of(function)
        raise UserError(
            f"scorer.function={name!r} must take two arguments: {form}. A prompt is a string, or a list of messages "
            "where the data are chats. Change its arguments."
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


def _call(function: Callable[..., Any], prompts: Any, responses: Any) -> Any:
    """Call a function in this order, or by name if it has its responses in another place."""
    names = _names(function)
    return function(**dict(zip(names, (responses, prompts), strict=False))) if names else function(prompts, responses)


def _names(function: Callable[..., Any]) -> list[str]:
    """What a function calls its responses, then its prompts if it takes them; empty if it takes both in our order."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some functions of C have none
        return []
    named = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
    responses = [each.name for each in named if each.name in ("responses", "completions")][:1]
    if not responses or [each.name for each in named[1:2] if each.kind is each.POSITIONAL_OR_KEYWORD] == responses:
        return []
    others = [each for each in named if each.name not in responses]
    prompts = [each.name for each in others if each.default is each.empty or each.name in ("prompts", "prompt")]
    if any(each.kind is each.VAR_KEYWORD for each in parameters):
        prompts.append("prompts")
    return responses + prompts[:1]


def _accepts(function: Callable[..., Any]) -> bool:
    """Whether a function can be called with prompts and responses."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return True
    names = _names(function)
    try:
        signature.bind(**dict.fromkeys(names)) if names else signature.bind(None, None)
    except TypeError:
        return False
    return True


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

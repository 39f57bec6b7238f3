"""How a user's function is called: by position, or by the names of its arguments."""

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from inspect import Parameter
from typing import Any, Self

RESPONSES = ("responses", "completions")
PROMPTS = ("prompts", "prompt")


@dataclass(frozen=True)
class CallForm:
    """What a function calls its arguments.

    Args:
        names: Of the responses, and of the prompts if it takes them. Empty: it takes prompts and responses by position.
        columns: Further arguments, which are columns of the prompts' rows.
    """

    names: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()

    @classmethod
    def of(cls, function: Callable[..., Any], known: Collection[str] = ()) -> Self | None:
        """How to call a function; None if it cannot be called with prompts, responses and columns.

        Args:
            known: Names of the columns that there are. With columns, the responses need their name.
        """
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):  # some functions of C have none
            return cls()
        parameters = [*signature.parameters.values()]
        named = [each for each in parameters if each.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)]
        takes_any = any(each.kind is Parameter.VAR_KEYWORD for each in parameters)
        responses = next((each.name for each in named if each.name in RESPONSES), None)
        if responses is None and (first := _before_prompts(named)):  # reward(texts, prompts)
            responses = first
        if not known and (responses is None or _is_second(responses, named)):
            return cls() if _binds(signature, None, None) else None
        if responses is None:
            return None
        bound = function.keywords if isinstance(function, partial) else {}
        taken = [each.name for each in named]
        columns = [
            each for each in known if (each in taken or takes_any) and each not in (*RESPONSES, *PROMPTS, *bound)
        ]
        names = [responses, *([each for each in taken if each in PROMPTS] or ["prompts"] * takes_any)]
        others = [
            each.name for each in named if each.default is Parameter.empty and each.name not in (*names, *columns)
        ]
        if len(names) == 1 and not known:
            names += others
        form = cls(tuple(names[:2]), tuple(columns))
        return form if _binds(signature, **dict.fromkeys([*form.names, *columns])) else None

    def call(self, function: Callable[..., Any], prompts: Any, responses: Any, columns: dict[str, Any]) -> Any:
        """Call the function."""
        if not self.names:
            return function(prompts, responses)
        return function(**dict(zip(self.names, (responses, prompts), strict=False)), **columns)


def _is_second(responses: str, named: list[Parameter]) -> bool:
    """Whether the responses stand where they are passed by position."""
    return [each.name for each in named[1:2] if each.kind is Parameter.POSITIONAL_OR_KEYWORD] == [responses]


def _before_prompts(named: list[Parameter]) -> str | None:
    """The first argument's name, if the second one is called prompts and gets them."""
    names = [each.name for each in named[:2]]
    return names[0] if len(names) == 2 and names[1] in PROMPTS and names[0] not in PROMPTS else None


def _binds(signature: inspect.Signature, *args: Any, **kwargs: Any) -> bool:
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True

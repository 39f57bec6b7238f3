"""The classes that the command line offers, and their options."""

from __future__ import annotations

import dataclasses
import inspect
import pydoc
import re
import sys
from functools import cache
from types import NoneType
from typing import Any, get_args, get_type_hints

from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser

from lit_align import callbacks
from lit_align.callbacks import AlignCallback
from lit_align.objectives import PreferenceObjective


def _named_callbacks() -> dict[str, type[Callback]]:
    exported = [getattr(callbacks, name) for name in callbacks.__all__]
    ours = [cls for cls in exported if issubclass(cls, AlignCallback) and cls.option_name]
    named: dict[str, type[Callback]] = {cls.option_name: cls for cls in ours}
    return named | {"checkpoint": ModelCheckpoint}


NAMED_CALLBACKS = _named_callbacks()
"""Callbacks with a top-level key, whose class is implied: `reference_refresh: {alpha: 0.6}`. In the list
`trainer.callbacks` the command line reaches only the last entry, so that nothing in it can be swept.
"""


@cache
def options(cls: Any) -> dict[str, Any]:
    """The options of a class and their defaults, with those that it passes on to its base class."""
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, fail_untyped=False, skip={"params"})
    return vars(parser.get_defaults(skip_validation=True).as_flat())


def subclasses(base: Any) -> list[type]:
    """The class and all its subclasses."""
    if not inspect.isclass(base):
        return []
    return list(dict.fromkeys([base, *(c for child in base.__subclasses__() for c in subclasses(child))]))


def is_base(cls: type) -> bool:
    """Whether a class is only inherited from: it has abstract methods, no formula, or a name that its room keeps."""
    if inspect.isabstract(cls) or cls.__name__.startswith("_"):
        return True
    if issubclass(cls, PreferenceObjective) and not hasattr(cls, "formula"):
        return True
    package, _, rest = cls.__module__.partition(".")
    if package != "lit_align" or dataclasses.is_dataclass(cls):
        return False
    room = sys.modules[f"{package}.{rest.partition('.')[0]}"]
    return cls.__name__ not in vars(room).get("__all__", [cls.__name__])


def class_names(base: Any) -> list[str]:
    """Names to choose from."""
    return sorted({c.__name__ for c in subclasses(base) if c is not base and not is_base(c)})


def type_of(cls: Any, option: str) -> type | None:
    """The class whose subclasses an option takes, or of which it takes a function's result; None without one."""
    for owner in inspect.getmro(cls) if inspect.isclass(cls) else ():
        if "__init__" in vars(owner) and (hint := _hints(owner).get(option)):
            parts = [part for part in get_args(hint) or [hint] if inspect.isclass(part) and part is not NoneType]
            return parts[-1] if parts else None
    return None


def _hints(cls: Any) -> dict[str, Any]:
    try:
        return get_type_hints(cls.__init__)
    except NameError:  # imported for type checkers alone
        return {}


FORMS = {"PR": "model.proximal above 0", "TR": "a moving reference (reference_refresh)"}


def form_hint(word: str) -> str:
    """A sentence on a name such as PR-DPO, which is a form of an objective and has no class; else empty."""
    form = re.fullmatch(r"(PR|TR)[-_ ]?(\w+)", word)
    if form is None or form[2] not in class_names(PreferenceObjective):
        return ""
    return f" {word} is {form[2]} with {FORMS[form[1]]}."


def known(base: Any) -> str:
    """A sentence with the names to choose from; empty if there are none, or too many to read."""
    names = class_names(base)
    return f"Known: {', '.join(names)}." if 0 < len(names) <= 24 else ""


def locate(path: str) -> Any:
    """The object of an import path, or None."""
    try:
        return pydoc.locate(path)
    except pydoc.ErrorDuringImport:
        return None


def import_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def name(cls: Any) -> str:
    return getattr(cls, "__name__", str(cls))

"""The classes that the command line offers, and their options."""

from __future__ import annotations

import inspect
import pydoc
from functools import cache
from typing import Any

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


def class_names(base: Any) -> list[str]:
    """Names to choose from. An objective states its formula; one without a formula is a base class."""
    classes = [c for c in subclasses(base) if c is not base and not c.__name__.startswith("_")]
    return sorted({c.__name__ for c in classes if base is not PreferenceObjective or hasattr(c, "formula")})


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

"""Errors of constructors: what a class of the configuration says about its options, as one paragraph."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from types import FrameType

from lightning.pytorch.cli import LightningCLI

from lit_align.errors import UserError, first_line

PACKAGES = {"lightning", "lightning_fabric", "lit_align", "torch", "transformers", "peft", "wandb"}
"""Packages whose constructors raise on wrong options. An error in the user's own code keeps its traceback."""


def raise_constructor_error(error: Exception) -> None:
    """Raise the error of a constructor, which jsonargparse wraps in a report of values that fit no type.

    Raises:
        UserError: a class of a known package refuses its options.
        Exception: the error of the user's own class, unchanged.
    """
    causes = [*_causes(error)]
    for cause in causes:
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(cause, ModuleNotFoundError):
            raise UserError(f"a package is missing: {first_line(cause)}. Install it.") from None
        if isinstance(cause, TypeError) and re.search(r"__init__\(\) missing \d", str(cause)):
            raise UserError(
                f"{cause}. Take it in the __init__ of your class, with its annotation, and pass it on; in "
                "an objective `policy: PolicyConfig`, and `super().__init__(policy, **kwargs)`."
            ) from None
    cause = causes[-1]
    frames = [frame for frame, _ in traceback.walk_tb(cause.__traceback__) if frame.f_code.co_name == "__init__"]
    made = [frame for frame in frames if _package(frame) != "jsonargparse" and not _is_parser(frame)]
    if not made:
        if found := re.search(r"Problem with given class_path '([^']+)':\s*(\S[^\n]*)", str(error)):
            raise UserError(f"{found[1]}: {found[2].rstrip('.')}. Change its options.") from None
        return
    if _package(made[-1]) not in PACKAGES:
        raise cause from None
    name = type(made[0].f_locals["self"]).__name__
    raise UserError(f"{name}: {first_line(cause)}. Change its options.") from None


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _is_parser(frame: FrameType) -> bool:
    return isinstance(frame.f_locals.get("self"), LightningCLI)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error, and what caused it, one after another."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__

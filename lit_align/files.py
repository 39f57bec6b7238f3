"""Files that are written whole or not at all, and JSON files that state their version."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError

from lit_align.console import relative
from lit_align.errors import UserError, first_line

T = TypeVar("T")


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file under another name and rename it, so that it is never incomplete.

    Args:
        write: Writes the file at the path that it is given.

    Raises:
        UserError: the disk is full, or the folder cannot be written to. An earlier file stays as it was.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(beside)
        os.replace(beside, path)
    except OSError as error:  # a full disk does not name the file
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise unwritable(path, error) from error


def write_text(path: Path, text: str) -> None:
    """`write_whole` of a text, in UTF-8."""
    write_whole(path, lambda beside: beside.write_text(text, encoding="utf-8"))


def write_versioned(path: Path, version: int, values: Mapping[str, Any]) -> None:
    """Write a JSON object that begins with its version."""
    write_text(path, json.dumps({"version": version, **values}, indent=2, ensure_ascii=False) + "\n")


def read_versioned(path: Path, version: int, parse: Callable[[dict[str, Any]], T], fix: str) -> T | None:
    """Parse the result of `write_versioned`; None if there is no file.

    Args:
        parse: Makes the result from the values.
        fix: What the user should do with a file that cannot be read.

    Raises:
        UserError: the file is damaged, or of another version.
    """
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("not an object")
        if (found := values.pop("version", None)) != version:
            raise ValueError(f"version {found} instead of {version}")
        return parse(values)
    except (ValueError, TypeError, KeyError, AttributeError) as error:  # cut off, or edited
        raise UserError(f"{path}: this version of lit_align cannot read it ({error}). {fix}") from error


@contextmanager
def writing(path: str | Path, option: str = "") -> Iterator[None]:
    """Turn errors of writing within this context, the system's or safetensors', into a message for the user.

    Args:
        option: The option or environment variable that names another folder.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise unwritable(path, error, option) from error


def unwritable(path: str | Path, error: Exception, option: str = "") -> UserError:
    """The message for a file that cannot be written."""
    reason = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
    another = f"another folder ({option})" if option else "another folder"
    return UserError(f"{relative(path)} cannot be written: {reason}. Make room, or name {another}.")


def digest(text: str | Iterable[str]) -> str:
    """8 hexadecimal digits that name a file by a text, which may come in pieces."""
    found = hashlib.sha256()
    for piece in [text] if isinstance(text, str) else text:
        found.update(piece.encode("utf-8", "surrogatepass"))
    return found.hexdigest()[:8]


def repr_in_pieces(values: Iterable[object]) -> Iterator[str]:
    """The text that `repr` gives of a list of these values."""
    yield "["
    for place, value in enumerate(values):
        yield f"{', ' if place else ''}{value!r}"
    yield "]"

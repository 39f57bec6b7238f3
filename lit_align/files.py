"""How files are written: whole or not at all."""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lit_align.console import relative
from lit_align.errors import UserError, first_line


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


@contextmanager
def writing(path: str | Path, option: str = "") -> Iterator[None]:
    """Turn the system's errors of writing within this context into a message for the user.

    Args:
        option: The option or environment variable that names another folder.
    """
    try:
        yield
    except OSError as error:
        raise unwritable(path, error, option) from error


def unwritable(path: str | Path, error: OSError, option: str = "") -> UserError:
    """The message for a file that cannot be written."""
    reason = error.strerror or first_line(error)
    another = f"another folder ({option})" if option else "another folder"
    return UserError(f"{relative(path)} cannot be written: {reason}. Make room, or name {another}.")


def digest(*texts: str) -> str:
    """8 hexadecimal digits that name a file by a text, which may come in pieces."""
    found = hashlib.sha256()
    for text in texts:
        found.update(text.encode("utf-8", "surrogatepass"))
    return found.hexdigest()[:8]

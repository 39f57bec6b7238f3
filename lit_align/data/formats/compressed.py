"""Files that may be compressed, read as streams."""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa

from lit_align.data.formats.rows import DataError
from lit_align.errors import first_line

_BROKEN = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)


class _Zstandard(io.RawIOBase):
    """The bytes of a .zst file."""

    def __init__(self, path: Path):
        self._stream = pa.input_stream(str(path), compression="zstd")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            return self._stream.readinto(buffer)
        except (pa.ArrowException, OSError) as error:
            raise EOFError(first_line(error)) from error


OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": lambda path: io.BufferedReader(_Zstandard(path)),
}
"""By the ending of a file's name, in lower case."""


def kind_of(path: Path) -> tuple[str, str]:
    """The endings of a file's name for its kind and its compression, in lower case: (.csv, .gz), (.csv, "")."""
    *others, last = ["", *(suffix.lower() for suffix in path.suffixes)]
    return ((others or [""])[-1], last) if last in OPENERS else (last, "")


def open_binary(path: Path) -> BinaryIO:
    """The bytes of a file, unpacked if its name says that they are packed."""
    opener = OPENERS.get(kind_of(path)[1])
    return path.open("rb") if opener is None else opener(path)


def whole(path: Path, parts: Iterator[Any]) -> Iterator[Any]:
    """Parts of a file that may be compressed.

    Raises:
        DataError: the file is damaged or cut off.
    """
    try:
        yield from parts
    except (*_BROKEN, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:  # not of bz2, whose errors have no number
            raise
        raise DataError(
            f"{path}: the compressed file is damaged or cut off ({first_line(error)}). Copy it again."
        ) from error

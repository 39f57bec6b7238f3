"""Readers of JSON: an object per line, a list of objects, or one object."""

import codecs
import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from lit_align.data.formats.compressed import kind_of, open_binary, whole
from lit_align.data.formats.record import Record
from lit_align.data.formats.rows import DataError
from lit_align.data.formats.written_out import has_surrogate, without_surrogates
from lit_align.errors import first_line, shown

PIECE = 1 << 18
"""Bytes of a list that are read at once."""
LARGEST_ROW = 1 << 24
"""Bytes that the one object of a .json file may have: it is read whole."""
_BLANK = b"\xef\xbb\xbf \t\r\n"
"""White space, and the mark that some editors put at the beginning of a file."""
_LONGEST_WORD = len("-Infinity")


def read_json(path: Path, skipped: Counter[str]) -> Iterator[Record]:
    """The rows of a file: an object per line, or a list of objects, which is read piece by piece."""
    name = path.name
    for number, values in whole(path, _numbered(path, skipped)):
        if not isinstance(values, dict):
            raise DataError(
                f'{name}:{number}: the row is {shown(values)}, but needs to be an object such as {{"prompt": "…"}}. '
                "Correct it, or take it out."
            )
        yield Record(values, f"{name}:{number}")


def _numbered(path: Path, skipped: Counter[str]) -> Iterator[tuple[int, Any]]:
    if _is_list(path):
        with open_binary(path) as file:
            yield from enumerate(_List(file, path.name, skipped), 1)
        return
    if kind_of(path)[0] == ".json" and (row := _one_object(path)) is not None:
        _check_row(row, path.name)
        yield 1, without_surrogates(row, skipped)
        return
    with open_binary(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _loads(line, path.name, number, skipped)


def _is_list(path: Path) -> bool:
    """Whether the file as a whole is a list, unlike one that holds a list per line."""
    with open_binary(path) as file:
        head = file.read(1024)
    if not head.decode(json.detect_encoding(head), "ignore").lstrip("\ufeff \t\r\n").startswith("["):
        return False
    if kind_of(path)[0] == ".json":
        return True
    with open_binary(path) as file:
        lines = (line for line in iter(partial(file.readline, PIECE), b"") if line.strip(_BLANK))
        return _parsed(next(lines)) is None or next(lines, None) is None


def _one_object(path: Path) -> dict[str, Any] | None:
    """The object that a file is as a whole, on one line or several; None if it holds one per line.

    Raises:
        DataError: the object is too large for one row.
    """
    with open_binary(path) as file:
        first = file.readline(LARGEST_ROW)
        if isinstance(_parsed(first), dict) and file.readline(PIECE).strip():
            return None
    with open_binary(path) as file:
        text = file.read(LARGEST_ROW + 1)
    if len(text) > LARGEST_ROW:
        if first.endswith(b"\n") and first.strip(_BLANK) != b"{":
            return None
        raise DataError(
            f"{path.name}: the file begins with an object of more than {LARGEST_ROW >> 20} MB, which is too large for "
            "one row. Write its rows as a list of objects, or one object per line into a .jsonl file."
        )
    value = _parsed(text)
    return value if isinstance(value, dict) else None


def _parsed(text: bytes) -> Any:
    """The value that a text spells out; None if it does not."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError, _RepeatedKey):
        return None


def _check_row(values: dict[str, Any], name: str) -> None:
    """Check that an object is one row, not a table by columns nor an object around the rows."""
    columns = list(values.values())
    by_place = all(isinstance(each, dict) and each and all(map(str.isdigit, each)) for each in columns)
    by_column = all(isinstance(each, list) and each and not isinstance(each[0], dict) for each in columns)
    if len(columns) > 1 and (by_place or by_column) and len({len(each) for each in columns}) == 1:
        raise DataError(
            f"{name}: the file holds a table by columns. Write one object per row, with pandas for example by "
            'to_json(…, orient="records", lines=True).'
        )
    for key, each in values.items() if not any(isinstance(each, str) for each in columns) else ():
        if isinstance(each, list) and each and all(map(_is_row, each)):
            raise DataError(
                f"{name}: the file is one object, whose `{key}` seems to hold the rows. Write these alone, as a list "
                "of objects, or one object per line."
            )


def _is_row(value: object) -> bool:
    """Whether a value may be a row, and not a message."""
    return isinstance(value, dict) and value.keys().isdisjoint(_MESSAGE_KEYS)


_MESSAGE_KEYS = frozenset({"role", "from", "speaker", "content", "value", "user", "input", "question"})


class _List:
    """The elements of a file that holds one list. A piece of its text is in memory at a time.

    Iteration raises a `DataError` that names the line of what cannot be read.
    """

    def __init__(self, file: BinaryIO, name: str, skipped: Counter[str]):
        self._file = file
        self._name = name
        self._skipped = skipped
        data = file.read(PIECE)
        self._decoder = codecs.getincrementaldecoder(json.detect_encoding(data))("surrogatepass")
        self._text = ""
        self._place = 0  # up to which the text has been read
        self._line, self._column = 1, 0  # at which the text begins
        self._add(data)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self._elements()
        except json.JSONDecodeError as error:
            raise _explained(error, self._name, self._line, self._column, self._place) from error
        except (ValueError, RecursionError, _RepeatedKey) as error:
            line = self._line + self._text.count("\n", 0, self._place)
            raise _explained(error, self._name, line) from error

    def _elements(self) -> Iterator[Any]:
        self._next()  # the bracket
        separator = ","
        self._place += 1
        if self._next() == "]":
            separator = "]"
            self._place += 1
        while separator == ",":
            self._next()
            yield self._value()
            separator = self._next()
            if separator not in ("]", ","):
                raise json.JSONDecodeError("Expecting ',' delimiter", self._text, self._place)
            self._place += 1
        if self._next():
            raise json.JSONDecodeError("Extra data", self._text, self._place)

    def _next(self) -> str:
        """The next character that is not white space; none at the end of the file."""
        while True:
            while self._place < len(self._text) and self._text[self._place] in " \t\r\n":
                self._place += 1
            if self._place < len(self._text) or self._ended:
                return self._text[self._place : self._place + 1]
            self._read_on()

    def _value(self) -> Any:
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._place)
            except json.JSONDecodeError as error:
                is_cut = error.pos + _LONGEST_WORD >= len(self._text) or error.msg.startswith("Unterminated")
                if not is_cut or self._ended:
                    raise
                self._read_on()
                continue
            if end == len(self._text) and not self._ended:  # it may continue
                self._read_on()
                continue
            may_have_half = has_surrogate(self._text, self._place, end)
            self._place = end
            return without_surrogates(value, self._skipped) if may_have_half else value

    def _read_on(self) -> None:
        """Drop what has been read and add more."""
        passed = self._text[: self._place]
        self._line += passed.count("\n")
        self._column = len(passed) - passed.rfind("\n") - 1 + (0 if "\n" in passed else self._column)
        self._text, self._place = self._text[self._place :], 0
        self._add(self._file.read(max(PIECE, len(self._text))))

    def _add(self, data: bytes) -> None:
        self._ended = not data
        try:
            self._text += self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            raise _explained(error, self._name, self._line + self._text.count("\n")) from error


def _loads(data: bytes, name: str, line: int, skipped: Counter[str]) -> Any:
    try:
        value = _DECODER.decode(data.decode(json.detect_encoding(data), "surrogatepass").rstrip())
    except (ValueError, RecursionError, _RepeatedKey) as error:
        raise _explained(error, name, line) from error
    may_have_half = b"\\ud" in data or b"\\uD" in data or b"\xed" in data  # much faster than the pattern
    return without_surrogates(value, skipped) if may_have_half and _SURROGATE_BYTES.search(data) else value


def _explained(error: Exception, name: str, line: int, column: int = 0, start: int = 0) -> DataError:
    """The message for text that cannot be read.

    Args:
        line: At which the text begins that the error is about.
        column: Characters before it on that line.
        start: Place in it from which it is shown.
    """
    if isinstance(error, UnicodeDecodeError):
        line += error.object.count(b"\n", 0, error.start)
        return DataError(f"{name}:{line}: this line is not UTF-8 ({error.reason}). Save the file as UTF-8.")
    if isinstance(error, json.JSONDecodeError):
        column = error.colno + (column if error.lineno == 1 else 0)
        text = error.doc[max(start, error.doc.rfind("\n", 0, error.pos) + 1) :]
        return DataError(
            f"{name}:{line + error.lineno - 1}: this line is not valid JSON ({error.msg}, column {column}): "
            f"{shown(text)}. A file holds one object per line, or one list of objects."
        )
    if isinstance(error, _RepeatedKey):
        return DataError(
            f"{name}:{line}: an object holds the key {shown(str(error))} twice, so that one value would be lost. Keep "
            "one of them."
        )
    if isinstance(error, RecursionError):
        return DataError(f"{name}:{line}: the values are nested too deeply to be read. Flatten them.")
    return DataError(f"{name}:{line}: a number has too many digits ({first_line(error)}). Write it as text.")


class _RepeatedKey(Exception):
    """A key that an object has twice."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise _RepeatedKey(next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1))
    return made


_DECODER = json.JSONDecoder(object_pairs_hook=_unique)
_SURROGATE_BYTES = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")

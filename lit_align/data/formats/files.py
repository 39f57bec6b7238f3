"""Readers of data files: JSON, JSON lines, CSV, TSV, Parquet, each also compressed."""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from lit_align.data.formats.record import Record
from lit_align.data.formats.rows import DataError, listing
from lit_align.errors import first_line, shown

_Reader = Callable[[Path, Counter[str]], Iterator[Record]]
_BROKEN = (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile)
_ARROW_ERRORS = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError)


def find_reader(path: Path) -> _Reader | None:
    """The reader of a file of this name; None if its kind is not known."""
    suffixes = path.suffixes[-2:]
    suffix = suffixes[-1] if suffixes else ""
    if suffix in _OPENERS and len(suffixes) == 2:
        suffix = suffixes[0]
        return None if suffix == ".parquet" else _READERS.get(suffix)
    return _READERS.get(suffix)


def _open(path: Path) -> BinaryIO:
    return _OPENERS.get(path.suffix, open)(path, "rb")  # type: ignore[return-value]


# --- JSON ---


def _read_json(path: Path, skipped: Counter[str]) -> Iterator[Record]:
    """One object per line, or a list of objects."""
    name = path.name
    for number, values in _whole(path, _numbered(path, skipped)):
        if not isinstance(values, dict):
            raise DataError(
                f'{name}:{number}: the row is {shown(values)}, but needs to be an object such as {{"prompt": "…"}}.'
            )
        yield Record(values, f"{name}:{number}")


def _numbered(path: Path, skipped: Counter[str]) -> Iterator[tuple[int, Any]]:
    with _open(path) as file:
        if ".json" in path.suffixes and file.read(1024).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            file.seek(0)
            yield from enumerate(_loads(file.read(), path.name, 1, skipped), 1)
            return
        file.seek(0)
        if ".json" in path.suffixes and (row := _one_object(file)) is not None:
            _check_row(row, path.name)
            yield 1, without_surrogates(row, skipped)
            return
        file.seek(0)
        for number, line in enumerate(file, 1):
            if line.strip():
                yield number, _loads(line, path.name, number, skipped)


def _one_object(file: BinaryIO) -> dict[str, Any] | None:
    """The object that a file is as a whole, on one line or several; None if it holds one per line."""
    first = file.readline()
    try:
        if isinstance(json.loads(first), dict) and file.readline().strip():
            return None
    except (ValueError, RecursionError):
        pass
    file.seek(0)
    try:
        value = json.loads(file.read(), object_pairs_hook=_unique)
    except (ValueError, RecursionError, _RepeatedKey):
        return None
    return value if isinstance(value, dict) else None


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


def _whole(path: Path, rows: Iterator[Any]) -> Iterator[Any]:
    """The rows of a file that may be compressed and cut off."""
    try:
        yield from rows
    except _BROKEN as error:
        raise DataError(
            f"{path}: the compressed file is damaged or cut off ({first_line(error)}). Copy it again."
        ) from error


def _loads(data: bytes, name: str, line: int, skipped: Counter[str]) -> Any:
    try:
        value = json.loads(data, object_pairs_hook=_unique)
    except UnicodeDecodeError as error:
        line += data.count(b"\n", 0, error.start)
        raise DataError(f"{name}:{line}: this line is not UTF-8 ({error.reason}). Save the file as UTF-8.") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{name}:{line + error.lineno - 1}: this line is not valid JSON ({error.msg}, column {error.colno}): "
            f"{shown(error.doc[error.doc.rfind(chr(10), 0, error.pos) + 1 :])}. A file holds one object per "
            "line, or (.json) one list of objects."
        ) from error
    except _RepeatedKey as error:
        raise DataError(
            f"{name}:{line}: an object holds the key {shown(str(error))} twice, so that one value would be lost. Keep "
            "one of them."
        ) from error
    except RecursionError as error:
        raise DataError(f"{name}:{line}: the values are nested too deeply to be read. Flatten them.") from error
    except ValueError as error:
        raise DataError(
            f"{name}:{line}: a number has too many digits ({first_line(error)}). Write it as text."
        ) from error
    return without_surrogates(value, skipped) if _SURROGATE.search(data) else value


class _RepeatedKey(Exception):
    """A key that stands twice in an object."""


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise _RepeatedKey(next(key for key, times in Counter(key for key, _ in pairs).items() if times > 1))
    return made


_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]|\xed[\xa0-\xbf]")


def without_surrogates(value: Any, skipped: Counter[str]) -> Any:
    """The value with � for half a surrogate pair, which is not a character that a tokenizer or a file can take."""
    if isinstance(value, dict):
        return {key: without_surrogates(each, skipped) for key, each in value.items()}
    if isinstance(value, list):
        return [without_surrogates(each, skipped) for each in value]
    if not isinstance(value, str):
        return value
    whole = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if whole != value:
        skipped["texts with half a surrogate pair, now �"] += 1
    return whole


# --- tables of text ---


def _read_table(path: Path, skipped: Counter[str]) -> Iterator[Record]:
    """CSV or TSV with the names of the columns in its first line."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with _open(path) as opened, io.TextIOWrapper(opened, encoding="utf-8-sig", newline="") as file:
        lines = _whole(path, file)
        rows = csv.reader(())
        try:
            head = next(lines, "")
            rows = csv.reader(chain([head], lines), delimiter=_delimiter(path, head), strict=True)
            names = [name or "(unnamed)" for name in next(rows, [])]
            check_unique(names, path.name)
            for number, row in enumerate(rows, 1):
                if not row:
                    continue
                if len(row) != len(names):
                    raise DataError(
                        f"{path.name}:{number}: the row has {len(row)} fields, but the first line names {len(names)} "
                        'columns. Put fields that hold separators or new lines in double quotes ("…").'
                    )
                yield Record(dict(zip(names, row, strict=True)), f"{path.name}:{number}")
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path.name}: the file is not UTF-8 near line {rows.line_num + 1} ({error.reason}). Save it as UTF-8."
            ) from error
        except csv.Error as error:
            raise DataError(f"{path.name}: line {rows.line_num} is not valid CSV ({first_line(error)}).") from error


def _delimiter(path: Path, head: str) -> str:
    """The separator of the names in the first line: a comma, or in files of spreadsheets a semicolon or a tab."""
    if ".tsv" in path.suffixes:
        return "\t"
    return "," if "," in head else max(",;\t", key=head.count)


def check_unique(names: list[str], source: str) -> None:
    """Check that no two columns have the same name."""
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        raise DataError(
            f"{source}: several columns have the same name ({listing(repeated)}), so that one would be lost. Rename "
            "one of them."
        )


# --- Parquet ---


def _read_parquet(path: Path, skipped: Counter[str]) -> Iterator[Record]:
    try:
        file = pq.ParquetFile(path)
        check_unique(file.schema_arrow.names, path.name)
    except DataError:
        raise
    except _ARROW_ERRORS as error:
        raise DataError(f"{path}: this is not a Parquet file ({first_line(error)}). Write it again.") from error
    yield from table_records((batch.to_pylist() for batch in file.iter_batches(1024)), str(path), path.name)


def table_records(batches: Iterator[list[dict[str, Any]]], path: str, name: str) -> Iterator[Record]:
    """The rows of Arrow tables.

    Raises:
        DataError: the tables are damaged.
    """
    try:
        for number, row in enumerate(chain.from_iterable(batches), 1):
            yield Record({key: without_nulls(value) for key, value in row.items()}, f"{name}:{number}")
    except DataError:
        raise
    except _ARROW_ERRORS as error:
        raise DataError(f"{path}: the file is damaged ({first_line(error)}). Copy or write it again.") from error


def without_nulls(value: Any) -> Any:
    """The value without the keys that Arrow adds to objects because other rows have them."""
    if isinstance(value, dict):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [without_nulls(each) for each in value]
    return value


def _open_zst(path: Path, mode: str) -> BinaryIO:
    try:
        return io.BytesIO(pa.input_stream(str(path), compression="zstd").read())
    except (pa.ArrowException, OSError) as error:
        raise EOFError(first_line(error)) from error


_OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zst}
_READERS: dict[str, _Reader] = {
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".json": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
}
FILE_KINDS = listing(_READERS)

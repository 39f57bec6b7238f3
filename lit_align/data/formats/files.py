"""Readers of data files: JSON, JSON lines, CSV and TSV, also compressed, Parquet and Arrow."""

import csv
import io
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lit_align.data.formats.compressed import kind_of, open_binary, whole
from lit_align.data.formats.json_files import read_json
from lit_align.data.formats.record import Record
from lit_align.data.formats.rows import DataError, listing
from lit_align.errors import first_line

BATCH = 1024
"""Rows of a table that become Python objects at once."""

_Reader = Callable[[Path, Counter[str]], Iterator[Record]]
_ARROW_ERRORS = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError)
_ARROW_FILE = b"ARROW1"


def find_reader(path: Path) -> _Reader | None:
    """The reader of a file of this name; None if its kind is not known."""
    kind, compression = kind_of(path)
    return None if compression and kind in _TABLES else _READERS.get(kind)


# --- tables of text ---


def _read_table(path: Path, skipped: Counter[str]) -> Iterator[Record]:
    """CSV or TSV with the names of the columns in its first line."""
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with open_binary(path) as opened, io.TextIOWrapper(opened, encoding="utf-8-sig", newline="") as file:
        lines = whole(path, file)
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
                f"{path.name}: the file is not UTF-8 near line {rows.line_num + 1} ({error.reason}). Save it as UTF-8 "
                "(in Excel: CSV UTF-8)."
            ) from error
        except csv.Error as error:
            raise DataError(
                f"{path.name}: line {rows.line_num} is not valid CSV ({first_line(error)}). Correct it, or take it out."
            ) from error


def _delimiter(path: Path, head: str) -> str:
    """The most frequent separator in the first line, outside quotes: a comma, or in files of spreadsheets another."""
    return "\t" if kind_of(path)[0] == ".tsv" else max(",;\t", key=re.sub(r'"[^"]*"', "", head).count)


def check_unique(names: list[str], source: str) -> None:
    """Check that no two columns have the same name."""
    repeated = [name for name, times in Counter(names).items() if times > 1]
    if repeated:
        raise DataError(
            f"{source}: several columns have the same name ({listing(repeated)}), so that one would be lost. Rename "
            "one of them."
        )


# --- tables of Arrow ---


def _read_parquet(path: Path, skipped: Counter[str]) -> Iterator[Record]:
    with _opening(path, "a Parquet"):
        file = pq.ParquetFile(path)
        check_unique(file.schema_arrow.names, path.name)
    yield from table_records(file.iter_batches(BATCH), str(path), path.name)


def _read_arrow(path: Path, skipped: Counter[str]) -> Iterator[Record]:
    """A file or a stream of Arrow, as `datasets` writes them."""
    with _opening(path, "an Arrow"):
        file = pa.memory_map(str(path))
        is_file = file.read(len(_ARROW_FILE)) == _ARROW_FILE
        file.seek(0)
        reader = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
        check_unique(reader.schema.names, path.name)
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
    yield from table_records(batches, str(path), path.name)


@contextmanager
def _opening(path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except _ARROW_ERRORS as error:
        raise DataError(f"{path}: this is not {kind} file ({first_line(error)}). Write it again.") from error


def table_records(batches: Iterable[pa.RecordBatch | pa.Table], path: str, name: str) -> Iterator[Record]:
    """The rows of Arrow tables. Maps become objects.

    Raises:
        DataError: the tables are damaged.
    """
    parts = (batch.slice(start, BATCH) for batch in batches for start in range(0, batch.num_rows, BATCH))
    rows = chain.from_iterable(map(_objects, parts))
    try:
        for number, row in enumerate(rows, 1):
            yield Record({key: as_in_json(value) for key, value in row.items()}, f"{name}:{number}")
    except DataError:
        raise
    except _ARROW_ERRORS as error:
        raise DataError(f"{path}: the file is damaged ({first_line(error)}). Copy or write it again.") from error


def _objects(part: pa.RecordBatch | pa.Table) -> list[dict[str, Any]]:
    part.validate(full=True)  # offsets of a damaged file would be followed anywhere
    return part.to_pylist(maps_as_pydicts="strict")


def as_in_json(value: Any) -> Any:
    """The value as JSON has it: without the keys that Arrow adds to objects because other rows have them, and decimals
    as usual numbers."""
    if isinstance(value, dict):
        return {key: as_in_json(each) for key, each in value.items() if each is not None}
    if isinstance(value, list):
        return [as_in_json(each) for each in value]
    if isinstance(value, Decimal):
        return float(value) if value % 1 else int(value)
    return value


_TABLES: dict[str, _Reader] = {".parquet": _read_parquet, ".arrow": _read_arrow}
_READERS: dict[str, _Reader] = {
    ".jsonl": read_json,
    ".ndjson": read_json,
    ".json": read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    **_TABLES,
}
FILE_KINDS = listing(_READERS)


def records_of_files(paths: Sequence[Path], read: Callable[[Path], Iterator[Record]]) -> Iterator[Record]:
    """The records of several files. Where files have the same name, their folders are part of the records' sources."""
    names = Counter(path.name for path in paths)
    root = os.path.commonpath([path.parent for path in paths])
    for path in paths:
        folder = f"{path.parent.relative_to(root)}/" if names[path.name] > 1 else ""
        yield from (replace(record, source=folder + record.source) if folder else record for record in read(path))

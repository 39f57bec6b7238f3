"""Rounds on disk: everything that is sampled, scored and recorded is kept, so that a killed run resumes where it was.

    rounds/
      round_000-3f9a2c1d/           named by what determines its samples: seed, prompts, sampling, policy fingerprint
        round.json                  the same, as readable text
        samples-00000.parquet       one sampling batch: a row per prompt with its responses, tokens, log π_s
        drawn-00000.parquet         the same without log π_s, until that is known (`ahead.py`)
        scores-<id>-00000.parquet   the scores of one scorer
        reference-<id>-00000.parquet   log π_ref under one reference

The rows are those of `row_types.py`. A sampling batch is the unit of writing and resuming. A file is written under
another name and renamed, so that no file is ever incomplete. Each file carries a checksum of its values and the round,
part and batch that they belong to; a damaged or misplaced file is reported, set aside, and computed again.

A round's folder, or a folder of rounds, is also a data set of prompts with ranked responses (`stored.py`).
"""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lit_align.console import print_line
from lit_align.data.rounds.row_types import LogpsRow, SampleRow, ScoreRow, StoredRow
from lit_align.files import digest, write_text, write_whole

R = TypeVar("R", bound=StoredRow)


class RoundStore:
    """One round's folder.

    Args:
        folder: Where rounds are kept.
        index: Number of the round in its run, from 0.
        key: All that determines the samples; plain values.
    """

    def __init__(self, folder: str | Path, index: int, key: dict[str, Any]):
        self.id = digest(json.dumps(key, sort_keys=True, ensure_ascii=False))
        self.path = Path(folder) / f"round_{index:03d}-{self.id}"
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "round.json").exists():
            write_text(self.path / "round.json", json.dumps(key, indent=2) + "\n")

    @property
    def samples(self) -> "Part[SampleRow]":
        """The round's responses."""
        return Part(self, "samples", SampleRow)

    @property
    def drawn(self) -> "Part[SampleRow]":
        """The round's responses without log π_s, sampled while the round before it trained."""
        return Part(self, "drawn", SampleRow)

    def scores(self, scorer: str) -> "Part[ScoreRow]":
        """The scores of one scorer, given its identity."""
        return Part(self, f"scores-{digest(scorer)}", ScoreRow)

    def logps(
        self, name: str, determined_by: Callable[[], Iterable[str]], known_as: str | None = None
    ) -> "Part[LogpsRow]":
        """Log-probabilities under one model.

        Args:
            determined_by: Gives a text, in pieces, of all that determines them.
            known_as: Determines that text, and is shorter. The digest of the text is then remembered under it, since
                the tokens of a large data set take seconds to read.
        """
        if known_as is None:
            return Part(self, f"{name}-{digest(determined_by())}", LogpsRow)
        remembered = self.path / f"{name}-{digest(known_as)}.name"
        if not remembered.exists():
            write_text(remembered, digest(determined_by()))
        return Part(self, f"{name}-{remembered.read_text()}", LogpsRow)


class Part(Generic[R]):
    """One kind of rows of a round, a file per batch.

    Args:
        store: The round.
        name: The files' name, without the batch's number.
        row: The rows' type.
    """

    def __init__(self, store: RoundStore, name: str, row: type[R]):
        self.store = store
        self.name = name
        self.row = row

    def file(self, batch: int) -> Path:
        return self.store.path / f"{self.name}-{batch:05d}.parquet"

    def is_stored(self, batch: int) -> bool:
        """Whether the rows of one batch are stored. A damaged file is set aside."""
        return self.table(batch) is not None

    def read(self, batch: int) -> list[R] | None:
        """The rows of one batch; None if they are not stored. A damaged file is set aside."""
        table = self.table(batch)
        return None if table is None else self.row.from_arrow(table)

    def table(self, batch: int) -> pa.Table | None:
        """The same as an Arrow table."""
        path = self.file(batch)
        if not path.exists():
            return None
        try:
            return read_table(path, self.row, self._place(batch))
        except Damaged as error:
            aside = path.with_suffix(".damaged")
            print_line(f"  {path} cannot be read ({error}); it is set aside as {aside.name} and computed again.")
            with contextlib.suppress(FileNotFoundError):  # another process was first
                os.replace(path, aside)
            return None

    def write(self, batch: int, rows: Sequence[R]) -> None:
        """Store the rows of one batch."""
        table = self.row.to_arrow(rows)
        table = table.replace_schema_metadata({CHECKSUM: checksum(table), PLACE: self._place(batch)})
        write_whole(self.file(batch), lambda path: pq.write_table(table, path))

    def _place(self, batch: int) -> bytes:
        return place_of(self.store.id, f"{self.name}-{batch:05d}")


class Damaged(Exception):
    """A file that cannot be read, or whose rows are not those that were written there."""


CHECKSUM = b"lit_align.sha256_of_values"
PLACE = b"lit_align.place"

_AddTexts = Callable[["hashlib._Hash", pa.StringArray], None]


def checksum(table: pa.Table) -> bytes:
    """Identifies the values of a table, regardless of how its memory is laid out."""
    return _checksum(table, _add_buffers)


def _checksum(table: pa.Table, add_texts: _AddTexts) -> bytes:
    found = hashlib.sha256()
    for name, column in zip(table.column_names, table.columns, strict=True):
        _add_values(found, name, column.combine_chunks(), add_texts)
    return found.hexdigest().encode()


def _add_values(found: "hashlib._Hash", name: str, array: pa.Array, add_texts: _AddTexts) -> None:
    kind = array.type if array.type.num_fields == 0 else ""  # Parquet renames the fields of lists
    found.update(f"{name} {kind} {len(array)}\n".encode())
    found.update(np.packbits(array.is_valid().to_numpy(zero_copy_only=False)).tobytes())
    if pa.types.is_struct(array.type):
        for place in range(array.type.num_fields):
            _add_values(found, array.type.field(place).name, array.field(place), add_texts)
    elif pa.types.is_list(array.type):
        found.update(array.value_lengths().fill_null(0).to_numpy().tobytes())
        _add_values(found, name, array.flatten(), add_texts)
    elif pa.types.is_string(array.type):
        add_texts(found, array)
    else:
        found.update(array.drop_null().to_numpy(zero_copy_only=False).tobytes())


def _add_buffers(found: "hashlib._Hash", texts: pa.StringArray) -> None:
    """The texts' lengths and their bytes, one after another."""
    texts = texts.drop_null()
    if len(texts):
        _, offsets, characters = texts.buffers()
        ends = np.frombuffer(offsets, np.int32)[texts.offset :][: len(texts) + 1]
        found.update(np.diff(ends).tobytes())
        found.update(memoryview(characters or b"")[ends[0] : ends[-1]])


def _add_json(found: "hashlib._Hash", texts: pa.StringArray) -> None:
    found.update(json.dumps(texts.to_pylist()).encode())


def _of_json(table: pa.Table) -> bytes:
    text = json.dumps(table.to_pylist(), sort_keys=True)  # a float's repr is exact
    return hashlib.sha256(text.encode()).hexdigest().encode()


CHECKSUMS = {
    CHECKSUM: checksum,
    b"lit_align.sha256_of_buffers": partial(_checksum, add_texts=_add_json),
    b"lit_align.sha256": _of_json,
}
"""By their names in a file, the newest first; files of earlier versions have the others."""


def _is_intact(table: pa.Table) -> bool:
    """Whether the rows match their checksum.

    Raises:
        Damaged: there is none.
    """
    metadata = table.schema.metadata or {}
    name = next((name for name in CHECKSUMS if name in metadata), None)
    if name is None:
        raise Damaged("it has no checksum")
    return metadata[name] == CHECKSUMS[name](table)


def place_of(round_id: str, name: str) -> bytes:
    """The round, part and batch that a file belongs to."""
    return f"{round_id}/{name}".encode()


def read_table(path: Path, row: type[R], place: bytes) -> pa.Table:
    """One file of a round.

    Args:
        row: The type of its rows.
        place: The round, part and batch that the file must belong to. Files of early versions do not say.

    Raises:
        Damaged: the file cannot be read, or its rows are not those that were written there.
    """
    if not path.is_file():
        raise Damaged("it is not a file")
    try:
        table = pq.read_table(path)
        metadata = table.schema.metadata or {}
        if not _is_intact(table):
            raise Damaged("its rows do not match their checksum")
        if metadata.get(PLACE, place) != place:
            raise Damaged(f"it belongs to {metadata[PLACE].decode(errors='replace')}")
        row.from_arrow(table[:1])
        return table
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, OverflowError, MemoryError) as error:
        raise Damaged((str(error) or type(error).__name__).partition("\n")[0]) from error

"""Rounds on disk: whatever was sampled, scored and recorded is kept, and a killed run goes on where it was.

    rounds/
      round_000-3f9a2c1d/           named by what determines its samples: seed, prompts, sampling, policy fingerprint
        round.json                  the same, to read
        samples-00000.parquet       one sampling batch: a row per prompt with its responses, tokens, log π_s
        scores-<id>-00000.parquet   the scores of one scorer
        reference-<id>-00000.parquet   log π_ref under one reference

A sampling batch is the unit of writing and resuming. Files are written beside and renamed, so that none is ever half
there, and each carries a checksum of its rows; one that is damaged is reported, set aside and made again, alone.

A round's folder, or a folder of rounds, is also a data set of prompts with ranked responses (`read_rounds`).
"""

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lit_align.console import print_line
from lit_align.errors import UserError


class RoundStore:
    """One round's folder.

    Args:
        folder: Where rounds are kept.
        index: Number of the round in its run, from 0.
        key: All that determines the samples; plain values.
    """

    def __init__(self, folder: str | Path, index: int, key: dict[str, Any]):
        self.index = index
        text = json.dumps(key, sort_keys=True, ensure_ascii=False)
        self.path = Path(folder) / f"round_{index:03d}-{digest(text)}"
        self.path.mkdir(parents=True, exist_ok=True)
        if not (self.path / "round.json").exists():
            _write_whole(self.path / "round.json", lambda path: path.write_text(json.dumps(key, indent=2) + "\n"))

    def has(self, part: str, batch: int) -> bool:
        """Whether there is a file of this part of this batch, whole or damaged."""
        return self._file(part, batch).exists()

    def read(self, part: str, batch: int) -> list[dict[str, Any]] | None:
        """The rows of one part of one batch; None if they are not there."""
        path = self._file(part, batch)
        if not path.exists():
            return None
        try:
            return read_part(path)
        except Damaged as error:
            aside = path.with_suffix(".damaged")
            print_line(f"  {path} cannot be read ({error}); it is set aside as {aside.name} and made again.")
            with contextlib.suppress(FileNotFoundError):  # another process was first
                os.replace(path, aside)
            return None

    def write(self, part: str, batch: int, rows: list[dict[str, Any]]) -> None:
        """Keep the rows of one part of one batch."""
        table = pa.Table.from_pylist(rows)
        table = table.replace_schema_metadata({CHECKSUM: _checksum(table.to_pylist())})
        _write_whole(self._file(part, batch), lambda path: pq.write_table(table, path))

    def _file(self, part: str, batch: int) -> Path:
        return self.path / f"{part}-{batch:05d}.parquet"


class Damaged(Exception):
    """A part that cannot be read, or does not hold what was written."""


CHECKSUM = b"lit_align.sha256"


def _checksum(rows: list[dict[str, Any]]) -> bytes:
    text = json.dumps(rows, sort_keys=True)  # a float's repr is exact
    return hashlib.sha256(text.encode()).hexdigest().encode()


def read_part(path: Path) -> list[dict[str, Any]]:
    """The rows of one file of a round.

    Raises:
        Damaged: it cannot be read, or its rows are not those that were written.
    """
    try:
        table = pq.read_table(path)
        rows = table.to_pylist()
    except (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError) as error:
        raise Damaged(str(error).partition("\n")[0]) from error
    checksum = (table.schema.metadata or {}).get(CHECKSUM)  # none in files of before there were any
    if checksum is not None and checksum != _checksum(rows):
        raise Damaged("its rows do not have their checksum")
    return rows


@dataclass(frozen=True)
class StoredRound:
    """A round as it is found on disk: what was sampled, and the scores of one scorer."""

    path: Path
    scorer: str
    rows: list[dict[str, Any]]  # those of the samples, each with `scores`, and `parts` and `preferences` if it has them
    damaged: list[Path]  # files left out

    @property
    def number(self) -> int:
        """Counted from 1, as on the screen."""
        return int(self.path.name.partition("_")[2].partition("-")[0]) + 1


def find_rounds(folder: str | Path) -> list[Path]:
    """The rounds in a run's folder, its `rounds`, or the one round that the folder is; in order, the older first."""
    folder = Path(folder)
    if (folder / "round.json").is_file():
        return [folder]
    found = [path.parent for place in (folder, folder / "rounds") for path in place.glob("round_*-*/round.json")]
    return sorted(found, key=lambda path: (path.name.partition("-")[0], (path / "round.json").stat().st_mtime_ns))


def read_rounds(folder: str | Path, scorer: str | None = None) -> list[StoredRound]:
    """The rounds in a folder with all that was sampled and scored; batches that are not whole are left out.

    Args:
        scorer: Identity of the scorer, or a part of it, where a round was scored by several.

    Raises:
        UserError: there is no round, nothing was scored, or it is not said which of several scorers is meant.
    """
    paths = find_rounds(folder)
    if not paths:
        raise UserError(f"{folder}: there are no rounds. Give a run's folder, its `rounds`, or one of these.")
    rounds = [stored for path in paths if (stored := _read_round(path, scorer))]
    if not rounds:
        raise UserError(f"{folder}: no round was scored yet. Resume the run.")
    return rounds


def _read_round(path: Path, scorer: str | None) -> StoredRound | None:
    damaged: list[Path] = []

    def read(file: Path) -> list[dict[str, Any]]:
        try:
            return read_part(file)
        except Damaged as error:
            print_line(f"  {file} cannot be read ({error}); it is left out. Resume the run to have it made again.")
            damaged.append(file)
            return []

    samples = {file.stem.rpartition("-")[2]: file for file in sorted(path.glob("samples-*.parquet"))}
    scored: dict[str, dict[str, list[dict[str, Any]]]] = {}  # by scorer and batch
    for file in sorted(path.glob("scores-*.parquet")):
        rows = read(file)
        if rows and file.stem.rpartition("-")[2] in samples:
            scored.setdefault(rows[0]["scorer"], {})[file.stem.rpartition("-")[2]] = rows
    if not scored:
        print_line(f"  {path} was not scored yet and is left out.")
        return None
    meant = [name for name in scored if scorer is None or scorer in name]
    if len(meant) != 1:
        which = "several scorers" if meant else f"no scorer {scorer!r}"
        names = "; ".join(scored)
        raise UserError(f"{path}: the round has {which}: name one by a part of its name (split, --scorer): {names}.")
    rows = [
        sample | {name: score[name] for name in ("scores", "parts", "preferences") if score.get(name) is not None}
        for batch, scores in scored[meant[0]].items()
        for sample, score in zip(read(samples[batch]), scores, strict=False)
    ]
    return StoredRound(path, meant[0], rows, damaged)


def digest(text: str) -> str:
    """8 hexadecimal digits that identify a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def _write_whole(path: Path, write: Any) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    write(beside)
    os.replace(beside, path)

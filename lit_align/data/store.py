"""Rounds on disk: whatever was sampled, scored and recorded is kept, and a killed run goes on where it was.

    rounds/
      round_000-3f9a2c1d/           named by what determines its samples: seed, prompts, sampling, policy fingerprint
        round.json                  the same, to read
        samples-00000.parquet       one sampling batch: a row per prompt with its responses, tokens, log π_s
        scores-<id>-00000.parquet   the scores of one scorer
        reference-<id>-00000.parquet   log π_ref under one reference

A sampling batch is the unit of writing and resuming. Files are written beside and renamed, so that none is ever half
there; one that cannot be read is reported, set aside and made again.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lit_align.console import say


class Round:
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

    def read(self, part: str, batch: int) -> list[dict[str, Any]] | None:
        """The rows of one part of one batch; None if they are not there."""
        path = self._file(part, batch)
        if not path.exists():
            return None
        try:
            return pq.read_table(path).to_pylist()
        except (pa.ArrowException, OSError) as error:
            aside = path.with_suffix(".damaged")
            say(f"  {path} cannot be read ({error}); it is set aside as {aside.name} and made again.")
            os.replace(path, aside)
            return None

    def write(self, part: str, batch: int, rows: list[dict[str, Any]]) -> None:
        """Keep the rows of one part of one batch."""
        table = pa.Table.from_pylist(rows)
        _write_whole(self._file(part, batch), lambda path: pq.write_table(table, path))

    def _file(self, part: str, batch: int) -> Path:
        return self.path / f"{part}-{batch:05d}.parquet"


def digest(text: str) -> str:
    """8 hexadecimal digits that identify a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]


def _write_whole(path: Path, write: Any) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    write(beside)
    os.replace(beside, path)

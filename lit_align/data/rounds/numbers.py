"""The numbers of a round by one scorer, kept in one file, so that a store of any size answers at once.

    .numbers-<id>.arrow     batch, rewards [K], finished [K], parts: a row per prompt; the names and sizes of the files
                            that they come from

The file only repeats what samples and scores hold: reading a round makes it, if it is missing or if the round's
files have changed since.
"""

import contextlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from lit_align.errors import UserError
from lit_align.files import digest, write_whole

_SCORES = re.compile(r"scores-(\w+)-(\d+)\.parquet")
_DIGEST, _SCORER = b"lit_align.files", b"lit_align.scorer"

Matrix = NDArray[np.float64]


class ScoredFiles(NamedTuple):
    """The files of a round's batches that one scorer has scored."""

    folder: Path
    scorer: str  # the digest of its identity
    batches: list[int]
    digest: str  # of names and sizes

    def samples(self, batch: int) -> Path:
        return self.folder / f"samples-{batch:05d}.parquet"

    def scores(self, batch: int) -> Path:
        return self.folder / f"scores-{self.scorer}-{batch:05d}.parquet"

    @property
    def numbers(self) -> Path:
        return self.folder / f".numbers-{self.scorer}.arrow"


def scored_files(folder: Path) -> list[ScoredFiles]:
    """The scored files in a round's folder, by scorer."""
    with os.scandir(folder) as entries:
        sizes = {entry.name: entry.stat().st_size for entry in entries}
    batches: dict[str, list[int]] = {}
    for name in sorted(sizes):
        match = _SCORES.fullmatch(name)
        if match and f"samples-{match[2]}.parquet" in sizes:
            batches.setdefault(match[1], []).append(int(match[2]))
    found = []
    for scorer, numbers in batches.items():
        files = ScoredFiles(folder, scorer, numbers, "")
        names = [path.name for number in numbers for path in (files.samples(number), files.scores(number))]
        found.append(files._replace(digest=digest(f"{name} {sizes[name]}\n" for name in names)))
    return found


@dataclass(frozen=True)
class RoundNumbers:
    """The numbers of each prompt's K responses, [prompts, K] each, in the order of the files.

    Args:
        scorer: Its identity.
        batch: The batch that each prompt is in, [prompts].
        finished: 1 if a response ended by itself, else 0; NaN where the file of the samples is damaged.
        parts: Numbers that make up the rewards, by name.
    """

    scorer: str
    batch: NDArray[np.int64]
    rewards: Matrix
    finished: Matrix
    parts: Mapping[str, Matrix]

    @property
    def part_means(self) -> dict[str, float]:
        """The mean of each part of the rewards, over all responses."""
        return {name: fmean(part.ravel()) for name, part in self.parts.items()}

    def save(self, files: ScoredFiles) -> None:
        """Keep the numbers beside the files; nothing happens in a folder that cannot be written to."""
        columns = {"batch": pa.array(self.batch), "rewards": _listed(self.rewards), "finished": _listed(self.finished)}
        columns |= {f"parts.{name}": _listed(part) for name, part in self.parts.items()}
        table = pa.table(columns).replace_schema_metadata({_DIGEST: files.digest, _SCORER: self.scorer})

        def write(path: Path) -> None:
            with pa.ipc.new_file(str(path), table.schema) as writer:
                writer.write_table(table)

        with contextlib.suppress(UserError):
            write_whole(files.numbers, write)

    def keep_in(self, folder: Path) -> None:
        """Keep the numbers in the folder of their round."""
        for files in scored_files(folder):
            if files.scorer == digest(self.scorer):
                self.save(files)

    @classmethod
    def read(cls, files: ScoredFiles) -> "RoundNumbers | None":
        """The numbers that are kept; None if there are none, or the files have changed since."""
        try:
            with pa.ipc.open_file(pa.memory_map(str(files.numbers))) as reader:
                table = reader.read_all()
            metadata = table.schema.metadata or {}
            if metadata[_DIGEST].decode() != files.digest:
                return None
            parts = {name[len("parts.") :]: _matrix(table[name]) for name in table.column_names if "." in name}
            batch = table["batch"].to_numpy()
            scorer = metadata[_SCORER].decode()
            return cls(scorer, batch, _matrix(table["rewards"]), _matrix(table["finished"]), parts)
        except (pa.ArrowException, OSError, KeyError, ValueError):
            return None


@dataclass
class NumbersBuilder:
    """Collects the numbers of a round from its tables of scores and samples, batch by batch."""

    scorer: str = ""
    batch: list[NDArray[np.int64]] = field(default_factory=list)
    rewards: list[Matrix] = field(default_factory=list)
    finished: list[Matrix] = field(default_factory=list)
    parts: dict[str, list[Matrix]] = field(default_factory=dict)

    def add(self, batch: int, scores: pa.Table, finished: pa.ChunkedArray | None) -> None:
        """Add a batch.

        Args:
            finished: Whether each response ended by itself; None if that cannot be read.
        """
        rewards = _matrix(scores["scores"])
        self.scorer = scores["scorer"][0].as_py()
        self.batch.append(np.full(len(rewards), batch))
        self.rewards.append(rewards)
        self.finished.append(np.full_like(rewards, np.nan) if finished is None else _matrix(finished))
        if "parts" in scores.column_names:
            column = scores["parts"].combine_chunks()
            for place in range(column.type.num_fields):
                part = _matrix(column.field(place))
                self.parts.setdefault(column.type.field(place).name, []).append(part)

    def built(self) -> RoundNumbers:
        """The numbers of all batches.

        Raises:
            UserError: the scorer gave a part for some batches only.
        """
        for name, part in self.parts.items():
            if len(part) < len(self.batch):
                raise UserError(
                    f"scorer {self.scorer} gave parts[{name!r}] for {len(part)} of {len(self.batch)} sampling batches. "
                    "Return the same parts for each response; the samples are kept."
                )
        parts = {name: np.concatenate(part) for name, part in self.parts.items()}
        rewards, finished = np.concatenate(self.rewards), np.concatenate(self.finished)
        return RoundNumbers(self.scorer, np.concatenate(self.batch), rewards, finished, parts)


def _matrix(column: pa.Array | pa.ChunkedArray) -> Matrix:
    """A column of equally long lists as a matrix."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    return column.flatten().to_numpy(zero_copy_only=False).astype(np.float64).reshape(len(column), -1)


def _listed(matrix: Matrix) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), matrix.shape[1])

"""`held_out/*.parquet`: one row per held-out prompt, with all responses and the rewards of all scorers."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from lit_align.errors import UserError, first_line
from lit_align.evaluation.summary import test_command
from lit_align.files import write_whole

ROWS_AT_ONCE = 256
"""Rows that are written together."""
SCORER = pa.struct(
    {
        "name": pa.string(),
        "identity": pa.string(),
        "rewards": pa.list_(pa.float64()),
        "rewards_start": pa.list_(pa.float64()),
        "win_rate": pa.float64(),
        "reward_data": pa.float64(),
    }
)
SCHEMA = pa.schema(
    {
        "source": pa.string(),
        "prompt": pa.string(),
        "prompt_ids": pa.list_(pa.int64()),
        "responses": pa.list_(pa.string()),
        "responses_start": pa.list_(pa.string()),
        "response_ids": pa.list_(pa.list_(pa.int64())),
        "response_ids_start": pa.list_(pa.list_(pa.int64())),
        "finished": pa.list_(pa.bool_()),
        "finished_start": pa.list_(pa.bool_()),
        "logps": pa.list_(pa.float64()),
        "logps_start": pa.list_(pa.float64()),
        "response_data": pa.string(),
        "scorers": pa.list_(SCORER),
    }
)


@dataclass(frozen=True)
class ScoredRow:
    """The rewards of one prompt's responses by one scorer, and their win rate against the start's."""

    name: str
    identity: str
    rewards: list[float]
    rewards_start: list[float]
    win_rate: float
    reward_data: float | None = None


@dataclass(frozen=True)
class HeldOutRow:
    """One held-out prompt with the responses of the policy and of the start.

    Args:
        prompt: Text; a chat as JSON.
        finished: Whether each response ended by itself, before the longest length.
        logps, logps_start: Log-probabilities of the policy's responses under the policy and under the start.
        response_data: The data set's own response.
    """

    source: str
    prompt: str
    prompt_ids: list[int]
    responses: list[str]
    responses_start: list[str]
    response_ids: list[list[int]]
    response_ids_start: list[list[int]]
    finished: list[bool]
    finished_start: list[bool]
    logps: list[float]
    logps_start: list[float]
    scorers: list[ScoredRow]
    response_data: str | None = None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each of the policy's responses."""
        return [len(ids) for ids in self.response_ids]

    @property
    def lengths_start(self) -> list[int]:
        return [len(ids) for ids in self.response_ids_start]

    def scored_by(self, name: str) -> ScoredRow | None:
        """The rewards by one scorer; None if the run does not have it."""
        return next((each for each in self.scorers if each.name == name), None)

    @classmethod
    def from_arrow(cls, values: dict[str, Any]) -> Self:
        scorers = [ScoredRow(**each) for each in values["scorers"]]
        return cls(**{**values, "scorers": scorers})  # type: ignore[arg-type]


def write_held_out(path: Path, rows: Iterable[HeldOutRow]) -> None:
    """Write the rows as they come."""

    def write(beside: Path) -> None:
        rest = iter(rows)
        with pq.ParquetWriter(beside, SCHEMA) as writer:
            while some := [asdict(row) for row in islice(rest, ROWS_AT_ONCE)]:
                writer.write_table(pa.Table.from_pylist(some, SCHEMA))

    write_whole(path, write)


def read_held_out(path: Path) -> list[HeldOutRow]:
    """The rows of a file; none if the file does not exist.

    Raises:
        UserError: the file is damaged, or another version's.
    """
    if not path.exists():
        return []
    try:
        table = pq.read_table(path)
        if not table.schema.equals(SCHEMA):
            raise pa.ArrowInvalid("another schema")
        return [HeldOutRow.from_arrow(row) for row in table.to_pylist()]
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        raise UserError(
            f"{path}: this version of lit_align cannot read it ({first_line(error)}). Delete it, or write it "
            f"again: {test_command(path.parent.parent)}"
        ) from error

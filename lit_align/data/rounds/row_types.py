"""The rows of a stored round: each type has one Arrow schema, with which it is written and read."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import pyarrow as pa

from lit_align.data.formats.rows import Text

NUMBERS = pa.list_(pa.float64())
TOKENS = pa.list_(pa.int64())


class StoredRow(Protocol):
    """A row that can be written to a Parquet file and read back."""

    @property
    def source(self) -> str:
        """Where the prompt is from; identifies it within its data set."""
        ...

    @classmethod
    def to_arrow(cls, rows: Sequence[Self]) -> pa.Table: ...

    @classmethod
    def from_arrow(cls, table: pa.Table) -> list[Self]:
        """Read the rows.

        Raises:
            KeyError, TypeError, ValueError: the table does not have the columns of these rows.
        """
        ...


class SampledTexts(NamedTuple):
    """A prompt with its K sampled responses, as texts: all that a scorer or a reader needs."""

    source: str
    prompt: Text
    responses: list[str]
    finished: list[bool]  # whether each response ended by itself
    beside: dict[str, Any] | None = None  # the columns that the chat template reads beside the prompt: tools, …

    @classmethod
    def from_arrow(cls, table: pa.Table) -> list[Self]:
        """The texts of a table of `SampleRow`; tokens, which are most of it, are not read."""
        names = [name for name in (*cls._fields, "is_chat") if name in table.column_names]
        return [cls(**row) for row in _from_json(table.select(names))]


@dataclass(frozen=True)
class SampleRow:
    """A prompt with its K sampled responses."""

    source: str
    prompt: Text
    prompt_ids: list[int]
    responses: list[str]
    response_ids: list[list[int]]
    finished: list[bool]  # whether each response ended by itself
    sampler_logps: list[float] | None  # log π_s of each response; None if it is not recorded
    beside: dict[str, Any] | None = None  # the columns that the chat template reads beside the prompt: tools, …

    SCHEMA: ClassVar = pa.schema(
        {
            "source": pa.string(),
            "prompt": pa.string(),  # of a chat, its messages as JSON
            "is_chat": pa.bool_(),
            "prompt_ids": TOKENS,
            "responses": pa.list_(pa.string()),
            "response_ids": pa.list_(TOKENS),
            "finished": pa.list_(pa.bool_()),
            "sampler_logps": NUMBERS,
        }
    )

    @classmethod
    def to_arrow(cls, rows: Sequence[Self]) -> pa.Table:
        records = []
        for row in rows:
            is_chat = not isinstance(row.prompt, str)
            prompt = json.dumps(row.prompt, ensure_ascii=False) if is_chat else row.prompt
            beside = row.beside and json.dumps(row.beside, ensure_ascii=False)
            records.append(_columns(row) | {"prompt": prompt, "is_chat": is_chat, "beside": beside})
        beside = [pa.field("beside", pa.string())] * any(row.beside for row in rows)  # as JSON
        return pa.Table.from_pylist(records, schema=pa.schema([*cls.SCHEMA, *beside]))

    @classmethod
    def from_arrow(cls, table: pa.Table) -> list[Self]:
        return [cls(**row) for row in _from_json(table)]


def _columns(row: StoredRow) -> dict[str, Any]:
    """The fields of a row. The name of a file that is not UTF-8 gets question marks."""
    return vars(row) | {"source": row.source.encode("utf-8", "replace").decode()}


def _from_json(table: pa.Table) -> list[dict[str, Any]]:
    """The rows of a table, with each chat as messages, and with the columns beside it."""
    rows = table.to_pylist()
    for row in rows:
        if row.pop("is_chat", False):  # without this column, a chat is a list of its messages
            row["prompt"] = json.loads(row["prompt"])
        row["beside"] = json.loads(row.get("beside") or "null")
    return rows


@dataclass(frozen=True)
class ScoreRow:
    """The scores of a prompt's K responses by one scorer."""

    source: str
    scorer: str  # its identity
    scores: list[float]
    parts: dict[str, list[float]] | None = None  # numbers that make up each score, such as a judge's grades
    preferences: list[list[float]] | None = None  # P(y_i ≻ y_j) of a pairwise scorer, [K, K]

    @classmethod
    def schema(cls, parts: Sequence[str], has_preferences: bool) -> pa.Schema:
        fields: dict[str, pa.DataType] = {"source": pa.string(), "scorer": pa.string(), "scores": NUMBERS}
        fields |= {"parts": pa.struct([(name, NUMBERS) for name in parts])} if parts else {}
        return pa.schema(fields | ({"preferences": pa.list_(NUMBERS)} if has_preferences else {}))

    @classmethod
    def to_arrow(cls, rows: Sequence[Self]) -> pa.Table:
        schema = cls.schema(list(rows[0].parts or {}), rows[0].preferences is not None)
        return pa.Table.from_pylist([*map(_columns, rows)], schema=schema)

    @classmethod
    def from_arrow(cls, table: pa.Table) -> list[Self]:
        return [cls(**row) for row in table.to_pylist()]


@dataclass(frozen=True)
class LogpsRow:
    """Log-probabilities of an example's responses under one model."""

    source: str
    logps: list[float]

    SCHEMA: ClassVar = pa.schema({"source": pa.string(), "logps": NUMBERS})

    @classmethod
    def to_arrow(cls, rows: Sequence[Self]) -> pa.Table:
        return pa.Table.from_pylist([*map(_columns, rows)], schema=cls.SCHEMA)

    @classmethod
    def from_arrow(cls, table: pa.Table) -> list[Self]:
        # before the column had this name it was named after the model: reference_logps, mismatched_logps
        old = {name: "logps" for name in table.column_names if name.endswith("_logps")}
        return [cls(**row) for row in table.rename_columns([old.get(n, n) for n in table.column_names]).to_pylist()]

"""From the stored samples and scores of a round to its groups, from Arrow columns to Arrow columns."""

from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa

from lit_align.data.rounds.numbers import NumbersBuilder, RoundNumbers
from lit_align.data.rounds.recorder import Loaded
from lit_align.data.rounds.row_types import SampleRow, ScoreRow
from lit_align.data.table import CHUNK, TOKENS, ExampleTable

GROUPS = {  # the columns of a table of examples, by the columns of stored rows
    "prompt_ids": ("prompt", TOKENS),
    "response_ids": ("responses", pa.list_(TOKENS)),
    "source": ("source", pa.binary()),
    "scores": ("rewards", pa.list_(pa.float64())),
    "sampler_logps": ("sampler_logps", pa.list_(pa.float64())),
    "responses": ("texts", pa.list_(pa.string())),
    "preferences": ("preferences", pa.list_(pa.list_(pa.float64()))),
}


def groups_of(samples: Loaded[SampleRow], scores: Loaded[ScoreRow]) -> tuple[ExampleTable, RoundNumbers]:
    """Each prompt with its K responses and all that is known of them, in the order of the prompts; and the numbers."""
    builder = NumbersBuilder()

    def batches() -> Iterator[pa.Table]:
        for number in range(len(samples.batches)):
            sampled, scored = samples.table(number), scores.table(number)
            builder.add(number, scored, sampled["finished"])
            yield _group(sampled, scored)

    groups = ExampleTable.temporary_of_batches(_merged(batches())).reordered(samples.order)
    return groups, builder.built()


def _group(samples: pa.Table, scores: pa.Table) -> pa.Table:
    stored = dict(zip(samples.column_names, samples.columns, strict=True))
    stored |= dict(zip(scores.column_names, scores.columns, strict=True))
    known = {name: column for name in GROUPS if (column := stored.get(name)) is not None and not column.null_count}
    columns = {GROUPS[name][0]: column.cast(GROUPS[name][1]) for name, column in known.items()}
    return pa.table(columns | {"weight": np.ones(len(samples))})


def _merged(tables: Iterable[pa.Table]) -> Iterator[pa.RecordBatch]:
    """Record batches of at least CHUNK rows, but for the last."""
    some: list[pa.Table] = []
    for table in tables:
        some.append(table)
        if sum(map(len, some)) >= CHUNK:
            yield _one_batch(some)
            some = []
    if some:
        yield _one_batch(some)


def _one_batch(tables: list[pa.Table]) -> pa.RecordBatch:
    (batch,) = pa.concat_tables(tables).combine_chunks().to_batches()
    return batch

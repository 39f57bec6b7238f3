"""Reading a data set whole: its layout is detected once, by the first row, and every further row must fit it."""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain

from lit_align.data.formats.layouts import FORMATS, Format
from lit_align.data.formats.rows import TOOLS, DataError, Kind, Record, Row, Rows, Skip, columns_of, either
from lit_align.data.formats.select import SELECT
from lit_align.data.formats.sources import read_records
from lit_align.errors import shown


def read_rows(path_or_name: str | os.PathLike[str], *, split: str | None = None, kind: Kind) -> Rows:
    """Read a data set whole, detecting its format.

    Args:
        path_or_name: A .jsonl, .json or .parquet file, a folder that `datasets` saved, rounds that `OnPolicyPairs`
            stored (a run's folder, or one round's), or a hub name, with a configuration behind a colon if need be
            (openai/summarize_from_feedback:comparisons).
        split: Split of a folder or hub name; None is a folder's only one, or else train. Of rounds that several
            scorers have scored: the one whose identity holds this.
        kind: What the rows are for. prompts: what precedes any response. preferences: the better response,
            then one or more worse ones. labelled: responses marked desirable or not; preferences give both.
            texts: one response to imitate; of a preference, the better one.

    Raises:
        DataError: the data set does not exist, is damaged, empty or of no known format, or a row is.
    """
    source = os.fspath(path_or_name)
    skipped: Counter[str] = Counter()
    records = read_records(source, split, skipped)
    first = next(records, None)
    if first is None:
        raise DataError(f"{source}: the data set is empty. Give one with at least one row.")
    format = _detect(first, kind)
    parsed = _parsed(format, chain([first], records), skipped)
    rows = list(SELECT[kind](parsed, skipped))
    if not rows:
        counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        raise DataError(f"{source}: nothing is left of what was read as {format.name}: {counts}.")
    form = _form(rows[0])
    for row in rows:
        if _form(row) != form:
            raise DataError(
                f"{row.source}: the prompt is {_form(row)}, but that of {rows[0].source} is {form}. Make all of them "
                'plain text, or messages like {"role": "user", "content": "…"}.'
            )
    columns = ", ".join(first.get(column)[0] for column in format.columns)
    return Rows(rows, format.name, f"{format.name}, {form} (columns {columns})", skipped)


def _form(row: Row) -> str:
    return "plain text" if isinstance(row.prompt, str) else "chat messages"


def _detect(first: Record, kind: Kind) -> Format:
    fitting = [format for format in FORMATS if kind in format.kinds]
    for format in fitting:
        if format.matches(first):
            return format
    forms = dict.fromkeys(" + ".join(either(column) for column in format.columns) for format in fitting)
    raise DataError(
        f"{first.source}: no {kind} can be read from the columns {columns_of(first)}. Rename them to one of "
        f"these forms: {'; '.join(forms)}."
    )


def _parsed(format: Format, records: Iterator[Record], skipped: Counter[str]) -> Iterator[Row]:
    for record in records:
        try:
            yield format.parse(record) if format.is_whole else _with_system(format.parse(record), record, skipped)
        except Skip as reason:
            skipped[str(reason)] += 1


def _with_system(row: Row, record: Record, skipped: Counter[str]) -> Row:
    """The row with the system message that stands in a column of its own at the head of its chat."""
    if record.values.get("tools") not in (None, "", "[]", "{}", [], {}):
        raise Skip(TOOLS)
    for name in ("system", "system_prompt"):
        value = record.values.get(name)
        if not isinstance(value, str) or not value.strip():
            continue
        if isinstance(row.prompt, str):
            if value.strip() in row.prompt:
                continue
            raise DataError(
                f"{record.source}: `{name}` holds {shown(value)}, but the prompt is plain text, which has no system "
                'message. Make `prompt` messages like {"role": "user", "content": "…"}, write it into `prompt`, or '
                "take the column out."
            )
        first = row.prompt[0]
        if first["role"] != "system":
            skipped[f"chats that now open with their `{name}`"] += 1
            row = replace(row, prompt=[{"role": "system", "content": value}, *row.prompt])
        elif first["content"].strip() != value.strip():
            raise DataError(
                f"{record.source}: `{name}` holds {shown(value)}, but the chat opens with the system message "
                f"{shown(first['content'])}. Keep one of them."
            )
    return row

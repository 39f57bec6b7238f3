"""Reading of a data set: its layout is detected once, from the first row, and all other rows must fit it."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain, groupby, islice

from lit_align.data.formats.beside import with_columns_beside
from lit_align.data.formats.columns import check_columns
from lit_align.data.formats.detect import detect_layout
from lit_align.data.formats.layouts.layout import TURNS, Layout
from lit_align.data.formats.prepare import Preparation
from lit_align.data.formats.record import LARGEST, Reading, Record
from lit_align.data.formats.rows import DataError, Kind, Row, Rows, Skip, Turns, listing
from lit_align.data.formats.select import SELECT
from lit_align.data.formats.sources import read_records
from lit_align.data.formats.spool import Spool
from lit_align.data.formats.unread import check_unread
from lit_align.errors import amount

SAMPLE = 1000
"""First rows, which show what columns there are and what their numbers mean."""

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def read_rows(
    path_or_name: Paths,
    *,
    split: str | None = None,
    kind: Kind,
    columns: Mapping[str, str] | None = None,
    ignore_columns: Sequence[str] = (),
    turns: Turns = "all",
    keep_columns: bool = False,
) -> Rows:
    """Read a data set and detect its layout.

    Args:
        path_or_name: A .jsonl, .ndjson, .json, .csv, .tsv, .parquet or .arrow file (texts also as .gz, .bz2, .xz or
            .zst), a list or a glob of files, a folder that `datasets` saved or that was downloaded from the hub, rounds
            that `OnPolicyPairs` stored (a run's folder, or one round's), or a hub name, with a configuration after a
            colon if needed (openai/summarize_from_feedback:comparisons). A split and a slice may follow:
            saved[test], rows.jsonl[95%:].
        split: Split of a folder or hub name, or a slice of it (train[:95%]); None is the only one, or else train. For
            rounds scored by several scorers: a part of one scorer's identity.
        kind: Use of the rows. prompts: prompts only. preferences: the better response, then one or more worse ones.
            labelled: responses marked desirable or not; preferences give both. texts: one response to imitate, the
            better one of a preference.
        columns: Source of each column: a column's name, a dotted path (answers.0.text), or a
            template ("{instruction}\n{input}").
        ignore_columns: Columns that are left out, although they may belong to the prompt.
        turns: For chats as `texts`: a row for each of the assistant's turns, or for the last turn only.
        keep_columns: Give each row all of its source's columns.

    Raises:
        DataError: the data set does not exist, is damaged or empty, or has an unknown layout; or a row does not fit it;
            or a column that may belong to the prompt is not read.
    """
    paths = [path_or_name] if isinstance(path_or_name, str | os.PathLike) else path_or_name
    source = listing(str(path) for path in paths)
    if turns == "last" and kind != "texts":
        raise DataError(
            f"{source}: turns=last has no effect on rows that are read as {kind}. Leave it out; for texts beside them, "
            "set it there: data.sft={path: …, turns: last}."
        )
    reading = Reading(mapped=frozenset(columns or ()))
    records = chain.from_iterable(read_records(os.fspath(path), split, reading.skipped) for path in paths)
    raw_sample = list(islice(records, SAMPLE))
    if not raw_sample:
        raise DataError(f"{source}: the data set is empty. Give one with at least one row.")
    check_columns(columns or {}, raw_sample)
    prepare = Preparation(columns or {}, ignore_columns, reading, keep_columns)
    reading.sample = list(map(prepare, raw_sample))

    layout = detect_layout(reading.sample[0], kind)
    if kind == "texts" and turns == "last" and layout.parse_turns and layout.turns != TURNS:
        raise DataError(f"{source}: turns=last has no effect on {layout.name}, whose labels choose. Leave it out.")
    parsed = _parsed(chain(reading.sample, map(prepare, records)), layout, kind, turns)
    left_out, form_sources = Counter[str](), dict[str, str]()
    rows = Spool(_noting_forms(SELECT[kind](parsed, left_out), form_sources))
    prepare.check_ignored(source)
    reading.skipped.update(left_out)
    if not rows:
        counts = ", ".join(amount(count, reason) for reason, count in reading.skipped.items())
        raise DataError(f"{source}: no row remains after reading {layout.name}: {counts}. Give other rows.")
    if reading.chat_because_of is not None:
        rows = Spool(map(_as_chat, rows))
        reading.skipped[f"prompts read as a chat, as `{reading.chat_because_of}` needs"] = len(rows)
    else:
        _check_one_form(form_sources)
    description = f"{layout.name}, {_form(rows[0])} (columns {listing(reading.read)})"
    if kind == "texts" and layout.parse_turns and (rows[0].is_verbatim or not isinstance(rows[0].prompt, str)):
        description += f"; {_count_turns(layout, rows, turns)}"
    return Rows(rows, layout.name, description, reading.skipped, tuple(reading.unread))


def _parsed(records: Iterable[Record], layout: Layout, kind: Kind, turns: Turns) -> Iterator[Row]:
    """The rows of all records; those that a rule leaves out are counted by its reason."""
    for record in records:
        reading = record.reading
        try:
            rows = layout.rows(record, kind, turns)
            if not layout.is_whole:
                rows = [with_columns_beside(row, record, may_become_chat=layout.may_become_chat) for row in rows]
            rows = rows or [Row("", source=record.source)]  # counted later as a row without a response
            if kind != "prompts" and (weight := _weight(record)) != 1:
                rows = [replace(row, weight=weight) for row in rows]
            if record.given:
                rows = [replace(row, columns=record.given) for row in rows]
            check_unread(rows[-1], record, kind, is_whole=layout.is_whole)
            reading.read |= dict.fromkeys(name for name in record.values if name in record.read)
            yield from rows
        except Skip as reason:
            reading.skipped[str(reason)] += 1


def _weight(record: Record) -> float:
    """The weight of a row; either all rows have one, or none has."""
    first = record.reading.sample[0]
    has, first_has = (each.has("weight") for each in (record, first))
    if has != first_has:
        raise DataError(
            f"{record.source}: the row has {'a' if has else 'no'} weight, but {first.source} has "
            f"{'one' if first_has else 'none'}. Give a weight to every row, or to none."
        )
    if not has:
        return 1.0
    name, value = record.get("weight")
    weight = record.number(name, value)
    if weight < 0 or 0 < weight < 1 / LARGEST:
        raise record.wrong(name, value, f"0 or a number from {1 / LARGEST:g} to {LARGEST:g}")
    if weight == 0:
        raise Skip("rows of weight 0")
    return weight


def _count_turns(layout: Layout, rows: Sequence[Row], turns: Turns) -> str:
    """How many parts of how many chats or texts are trained on."""
    wholes = sum(1 for _ in groupby(row.source for row in rows))
    name = "chats" if layout.turns == TURNS else "texts"
    parts = "the last turn of the assistant" if turns == "last" else amount(len(rows), layout.turns)
    return f"{parts} in {amount(wholes, name)}"


# --- prompts are all plain text, or all chats ---


def _form(row: Row) -> str:
    return "plain text" if isinstance(row.prompt, str) else "chat messages"


def _noting_forms(rows: Iterator[Row], sources: dict[str, str]) -> Iterator[Row]:
    """The rows as they are; `sources` gets the first row of each form."""
    for row in rows:
        sources.setdefault(_form(row), row.source)
        yield row


def _check_one_form(sources: dict[str, str]) -> None:
    if len(sources) > 1:
        (form, source), (other_form, other_source) = sources.items()
        raise DataError(
            f"{other_source}: the prompt is {other_form}, but that of {source} is {form}. Make all of them plain "
            'text, or messages like {"role": "user", "content": "…"}.'
        )


def _as_chat(row: Row) -> Row:
    return replace(row, prompt=[{"role": "user", "content": row.prompt}]) if isinstance(row.prompt, str) else row

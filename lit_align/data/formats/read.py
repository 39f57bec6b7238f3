"""Reading of a data set: its layout is detected once, from the first row, and all other rows must fit it."""

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby, islice
from typing import Any

from lit_align.data.formats.beside import check_unread, with_columns_beside
from lit_align.data.formats.columns import TARGETS, check_columns, mapped
from lit_align.data.formats.layouts import LAYOUTS
from lit_align.data.formats.layouts.layout import CHATS, TURNS, Layout
from lit_align.data.formats.layouts.ranked import RESPONSES
from lit_align.data.formats.record import LARGEST, Reading, Record, columns_of
from lit_align.data.formats.rows import DataError, Kind, Row, Rows, Skip, Turns, listing, shortened
from lit_align.data.formats.select import SELECT
from lit_align.data.formats.sources import read_records
from lit_align.data.formats.spool import Spool

SAMPLE = 1000  # rows used to check columns and to interpret numbers

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def read_rows(
    path_or_name: Paths,
    *,
    split: str | None = None,
    kind: Kind,
    columns: Mapping[str, str] | None = None,
    ignore_columns: Sequence[str] = (),
    turns: Turns = "all",
) -> Rows:
    """Read a data set and detect its layout.

    Args:
        path_or_name: A .jsonl, .ndjson, .json, .csv, .tsv, .parquet or .arrow file (texts also as .gz, .bz2, .xz or
            .zst), a list or a glob of files, a folder that `datasets` saved or that was downloaded from the hub, rounds
            that `OnPolicyPairs` stored (a run's folder, or one round's), or a hub name, with a configuration after a
            colon if needed (openai/summarize_from_feedback:comparisons). A slice may follow: rows.jsonl[:100],
            rows.jsonl[95%:].
        split: Split of a folder or hub name, or a slice of it (train[:95%]); None is the only one, or else train. For
            rounds scored by several scorers: a part of one scorer's identity.
        kind: Use of the rows. prompts: prompts only. preferences: the better response, then one or more worse ones.
            labelled: responses marked desirable or not; preferences give both. texts: one response to imitate, the
            better one of a preference.
        columns: Source of each column: a column's name, a dotted path (answers.0.text), or a
            template ("{instruction}\n{input}").
        ignore_columns: Columns that are left out, although they may belong to the prompt.
        turns: For chats as `texts`: a row for each of the assistant's turns, or for the last turn only.

    Raises:
        DataError: the data set does not exist, is damaged or empty, or has an unknown layout; or a row does not fit it;
            or a column that may belong to the prompt is not read.
    """
    paths = [path_or_name] if isinstance(path_or_name, str | os.PathLike) else path_or_name
    source = listing(str(path) for path in paths)
    reading, ignored = Reading(mapped=frozenset(columns or ())), _Ignored(ignore_columns)
    records = chain.from_iterable(read_records(os.fspath(path), split, reading.skipped) for path in paths)
    prepared = _prepared(records, source, columns or {}, ignored, reading)
    first = next(prepared)
    _check_first(first)
    layout = _detect(first, kind)
    if kind == "texts" and turns == "last" and layout.parse_turns and layout.turns != TURNS:
        raise DataError(f"{source}: turns=last has no effect on {layout.name}, whose labels choose. Leave it out.")
    forms, selected = _Forms(), Counter[str]()
    parsed = _parsed(layout, chain([first], prepared), kind, turns)
    rows = Spool(forms.seen(SELECT[kind](forms.counted(parsed), selected)))
    ignored.check(source)
    reading.skipped.update(selected)
    if (column := reading.chat_because_of) is not None:
        rows = Spool(map(_as_chat, rows))
        reading.skipped[f"prompts that are now chats, as `{column}` needs"] = forms.count
    else:
        forms.check()
    if not rows:
        counts = ", ".join(f"{count} {reason}" for reason, count in reading.skipped.items())
        raise DataError(f"{source}: no row remains after reading {layout.name}: {counts}.")
    description = f"{layout.name}, {_form(rows[0])} (columns {listing(reading.read)})"
    if kind == "texts" and layout.parse_turns and (rows[0].is_verbatim or not isinstance(rows[0].prompt, str)):
        description += f"; {_count_turns(layout, rows, turns)}"
    return Rows(rows, layout.name, description, reading.skipped, tuple(reading.unread))


def _prepared(
    records: Iterator[Record], source: str, columns: Mapping[str, str], ignored: "_Ignored", reading: Reading
) -> Iterator[Record]:
    """The records as layouts read them: with the mapped columns, flat, and without the ignored ones."""
    sample = list(islice(records, SAMPLE))
    if not sample:
        raise DataError(f"{source}: the data set is empty. Give one with at least one row.")
    if columns:
        check_columns(columns, sample)
    prepare = mapped(columns)
    reading.sample = [_flat(prepare(record, reading)) for record in sample]
    for record in chain(sample, records):
        yield ignored.without(_flat(prepare(ignored.without(record), reading)), but=reading.mapped)


def _count_turns(layout: Layout, rows: Sequence[Row], turns: Turns) -> str:
    """How many parts of how many chats or texts are trained on."""
    wholes = sum(1 for _ in groupby(row.source for row in rows))
    name = "chat" if layout.turns == TURNS else "text"
    parts = "the last turn of the assistant" if turns == "last" else f"{len(rows)} {layout.turns}"
    return f"{parts} in {wholes} {name if wholes == 1 else f'{name}s'}"


def _form(row: Row) -> str:
    return "plain text" if isinstance(row.prompt, str) else "chat messages"


class _Forms:
    """Counts rows, and keeps the first of those that are selected and the first whose prompt has another form."""

    def __init__(self) -> None:
        self.count = 0
        self.first: Row | None = None
        self.other: Row | None = None

    def counted(self, rows: Iterator[Row]) -> Iterator[Row]:
        for row in rows:
            self.count += 1
            yield row

    def seen(self, rows: Iterator[Row]) -> Iterator[Row]:
        for row in rows:
            self.first = self.first or row
            if self.other is None and _form(row) != _form(self.first):
                self.other = row
            yield row

    def check(self) -> None:
        """Check that all prompts are plain text, or all chats."""
        if self.first and self.other:
            raise DataError(
                f"{self.other.source}: the prompt is {_form(self.other)}, but that of {self.first.source} is "
                f"{_form(self.first)}. Make all of them plain text, or messages like "
                '{"role": "user", "content": "…"}.'
            )


class _Ignored:
    """Removes the ignored columns, and checks that they exist."""

    def __init__(self, names: Sequence[str]):
        self.names = names
        self.missing = set(names)

    def without(self, record: Record, but: Collection[str] = ()) -> Record:
        """The record without the columns, except for those that a mapping made."""
        names = [name for name in self.names if name in record.values and name not in but]
        if not names:
            return record
        self.missing.difference_update(names)
        return replace(record, values={name: value for name, value in record.values.items() if name not in names})

    def check(self, source: str) -> None:
        if self.missing:
            raise DataError(
                f"ignore_columns={list(self.names)} must name columns of {source}, and no row has "
                f"{listing(sorted(self.missing))}. Correct the names, or leave them out."
            )


def _flat(record: Record) -> Record:
    """The record with objects that hold a chat or several responses in the form of the layouts.

    The fields of an object with messages (OpenAI's `input: {messages: …}`) become columns. Lists side by side in an
    object, as `datasets` writes a sequence of objects, become a list of objects.
    """
    objects = {name: value for name, value in record.values.items() if isinstance(value, dict)}
    if not objects:
        return record
    values = dict(record.values)
    for name, value in objects.items():
        if "messages" in value and "messages" not in values:
            del values[name]
            values |= {key if key in ("messages", "tools") else f"{name}.{key}": each for key, each in value.items()}
        elif name in _SEQUENCES:
            values[name] = _transposed(value)
    return replace(record, values=values)


_SEQUENCES = frozenset(f"{CHATS}|{RESPONSES}".split("|"))


def _transposed(value: dict[str, Any]) -> Any:
    """A list of objects, if the value is an object of lists of the same length."""
    lists = list(value.values())
    if not lists or not all(isinstance(each, list) and len(each) == len(lists[0]) for each in lists):
        return value
    return [dict(zip(value, each, strict=True)) for each in zip(*lists, strict=True)]


@dataclass(frozen=True)
class _Example:
    """The suggestion of an error about unknown columns.

    Args:
        wanted: Name of the rows.
        mapping: The simplest mapping.
        others: Other columns that are read.
        user: What learns from such rows; empty for prompts, which nearly all columns give.
    """

    wanted: str
    mapping: str
    others: str
    user: str = ""


_EXAMPLES: dict[Kind, _Example] = {
    "prompts": _Example("prompts", "prompt: …", "messages"),
    "preferences": _Example(
        "preferences",
        "prompt: …, chosen: …, rejected: …",
        "prompt + response_1 + response_2 + winner; prompt + responses + rewards (or ranks)",
        "objectives such as DPO",
    ),
    "labelled": _Example("labelled responses", "prompt: …, completion: …, label: …", "messages + label; pairs", "KTO"),
    "texts": _Example("texts", "prompt: …, completion: …", "messages; text; pairs", "SFT"),
}
_HINTS = {
    "message_tree_id": "shows that the rows are messages or trees of them. Make a chat (messages: [{role, content}, "
    "…]) of each path from a first message to an answer.",
}
"""Advice on columns of layouts that are not read."""


def _detect(first: Record, kind: Kind) -> Layout:
    if hint := next((f"`{name}` {hint}" for name, hint in _HINTS.items() if name in first.values), None):
        raise DataError(f"{first.source}: {hint}")
    if (layout := _fitting(first, kind)) is None:
        raise _unknown_layout(first, kind)
    return layout


def _unknown_layout(first: Record, kind: Kind) -> DataError:
    """The error for columns that no layout reads: which names to change, or how to map them."""
    example = _EXAMPLES[kind]
    if "segments" in first.values and kind != "texts":
        return DataError(
            f"{first.source}: `segments` are the parts of a text to imitate, and no {example.wanted} can be made of "
            "them. Imitate them (SFT), or give other data."
        )
    lowered = {name.strip().lower(): name for name in first.values}
    if _fitting(replace(first, values={name: first.values[lowered[name]] for name in lowered}), kind):
        changed = ", ".join(
            f"{name}: {given!r}" for name, given in lowered.items() if name in TARGETS and name != given
        )
        return DataError(
            f"{first.source}: the names of the columns {shortened(columns_of(first))} differ from those that are read "
            f"in case or spaces. Set columns={{{changed}}}."
        )
    others = (other for name, other in _EXAMPLES.items() if other.user and _fitting(first, name))
    fitting = next((f"; they are {other.wanted}, for {other.user}" for other in others), "")
    return DataError(
        f"{first.source}: no {example.wanted} can be read from the columns {shortened(columns_of(first))}{fitting}. "
        f"Say which is which with columns={{{example.mapping}}}: names, templates such as '{{question}} {{context}}', "
        f"or paths such as answers.0.text. These columns are read, too: {example.others}."
    )


def _fitting(first: Record, kind: Kind) -> Layout | None:
    return next((layout for layout in LAYOUTS if kind in layout.kinds and layout.matches(first)), None)


def _check_first(first: Record) -> None:
    """Check that the first row, which decides the layout, has a prompt where others have one."""
    given = next((each for each in first.reading.sample if each.has("prompt")), None)
    if given is not None and "prompt" in first.values and not first.has("prompt"):
        raise DataError(
            f"{first.source}: `prompt` is null, but {given.source} has one. Fill it in, or take the row out."
        )


def _parsed(layout: Layout, records: Iterator[Record], kind: Kind, turns: Turns) -> Iterator[Row]:
    first: Record | None = None
    for record in records:
        first = first or record
        try:
            rows = layout.parse_turns(record) if kind == "texts" and layout.parse_turns else [layout.parse(record)]
            if turns == "last":
                rows = rows[-1:]
            if not layout.is_whole:
                rows = [with_columns_beside(row, record, may_become_chat=layout.may_become_chat) for row in rows]
            if kind != "prompts" and (weight := _weight(record, first)) is not None:
                rows = [replace(row, weight=weight) for row in rows]
            whole = rows[-1:] or [Row("", source=record.source)]
            check_unread(whole[0], record, kind, is_whole=layout.is_whole)
            record.reading.read |= {name: None for name in record.values if name in record.read}
            yield from rows or whole
        except Skip as reason:
            record.reading.skipped[str(reason)] += 1


def _weight(record: Record, first: Record) -> float | None:
    """The weight of a row; either all rows have one, or none has."""
    has, first_has = (each.has("weight") for each in (record, first))
    if has != first_has:
        raise DataError(
            f"{record.source}: the row has {'a' if has else 'no'} weight, but {first.source} has "
            f"{'one' if first_has else 'none'}. Give a weight to every row, or to none."
        )
    if not has:
        return None
    name, value = record.get("weight")
    weight = record.number(name, value)
    if weight < 0 or 0 < weight < 1 / LARGEST:
        raise record.wrong(name, value, f"0 or a number from {1 / LARGEST:g} to {LARGEST:g}")
    if weight == 0:
        raise Skip("rows of weight 0")
    return weight


def _as_chat(row: Row) -> Row:
    return replace(row, prompt=[{"role": "user", "content": row.prompt}]) if isinstance(row.prompt, str) else row

"""Raw records in the form that layouts read: with the user's columns, flat, and without the columns to ignore."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lit_align.data.formats.column_names import CHATS, RESPONSES
from lit_align.data.formats.columns import mapped
from lit_align.data.formats.record import Reading, Record
from lit_align.data.formats.rows import DataError, listing

_SEQUENCES = frozenset(f"{CHATS}|{RESPONSES}".split("|"))


class Preparation:
    """Prepares one record after the other.

    Args:
        columns: Mapping of columns by the user.
        ignore: Names of columns to leave out: those of the files, and those that mapping and flattening make of them.
        reading: Account that the prepared records share.
        keep_given: Keep the values of the raw record, too.
    """

    def __init__(self, columns: Mapping[str, str], ignore: Sequence[str], reading: Reading, keep_given: bool):
        self._map, self._ignore, self._reading = mapped(columns), ignore, reading
        self._keep_given = keep_given
        self._missing = set(ignore)

    def __call__(self, record: Record) -> Record:
        prepared = _flat(self._map(self._without(record, self._ignore), self._reading))
        prepared = self._without(prepared, [name for name in self._ignore if name not in self._reading.mapped])
        return replace(prepared, given=record.values) if self._keep_given else prepared

    def _without(self, record: Record, ignore: Sequence[str]) -> Record:
        found = [name for name in ignore if name in record.values]
        if not found:
            return record
        self._missing.difference_update(found)
        return replace(record, values={name: value for name, value in record.values.items() if name not in found})

    def check_ignored(self, source: str) -> None:
        """Check that each ignored column was in one of the records.

        Raises:
            DataError: one was in none.
        """
        if self._missing:
            raise DataError(
                f"ignore_columns={list(self._ignore)} must name columns of {source}, and no row has "
                f"{listing(sorted(self._missing))}. Correct the names, or leave them out."
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


def _transposed(value: dict[str, Any]) -> Any:
    """A list of objects, if the value is an object of lists of the same length."""
    lists = list(value.values())
    if not lists or not all(isinstance(each, list) and len(each) == len(lists[0]) for each in lists):
        return value
    return [dict(zip(value, each, strict=True)) for each in zip(*lists, strict=True)]

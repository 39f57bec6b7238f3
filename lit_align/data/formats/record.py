"""A raw row, with getters that check values and record which columns were read."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lit_align.data.formats.messages import MessageReader, wrong_value
from lit_align.data.formats.rows import DataError, Message, Text, is_empty, listing
from lit_align.data.formats.written_out import written_out


@dataclass
class Reading:
    """The account of reading one data set."""

    skipped: Counter[str] = field(default_factory=Counter)  # rows left out or changed, by reason
    unread: dict[str, None] = field(default_factory=dict)  # names of columns and of messages' keys, in order
    read: dict[str, None] = field(default_factory=dict)  # names of the columns that were read, in order
    sample: Sequence["Record"] = ()  # the first rows
    chat_because_of: str | None = None  # the column that turned plain prompts into chats
    mapped: frozenset[str] = frozenset()  # the columns that the user's mapping makes
    repeats_prompt: bool | None = None  # whether the responses of all of the first rows begin with their prompt


@dataclass(frozen=True)
class Record:
    """A raw row. Its getters raise a `DataError` that says what is wrong; `a|b` is either column."""

    values: Mapping[str, Any]
    source: str
    reading: Reading = field(default_factory=Reading)
    read: set[str] = field(default_factory=set)  # names of the columns that were read
    given: Mapping[str, Any] = field(default_factory=dict)  # the raw row's values, if they are kept
    cut: tuple[bool, ...] | None = None  # whether each response was cut at a limit, if that is known

    def has(self, column: str) -> bool:
        return any(self.values.get(name) is not None for name in column.split("|"))

    def get(self, column: str) -> tuple[str, Any]:
        """The column's name and its value."""
        for name in column.split("|"):
            if (value := self.values.get(name)) is not None:
                self.read.add(name)
                return name, value
        first = self.reading.sample[0].values if self.reading.sample else {}
        missing = next((name for name in column.split("|") if first.get(name) is not None), either(column))
        raise DataError(
            f"{self.source}: the row has no {missing}, as the first row has; its columns are "
            f"{columns_of(self)}. Fill it in, or take the row out."
        )

    def filled(self, column: str) -> str | None:
        """The first of the columns that is not empty."""
        return next((name for name in column.split("|") if not is_empty(self.values.get(name))), None)

    def text(self, column: str) -> Text:
        return self._text(*self.get(column))

    def texts(self, column: str) -> list[Text]:
        """A list of texts, or a single one."""
        name, value = self.get(column)
        return [self._text(name, each) for each in value] if is_several(value) else [self._text(name, value)]

    def chat(self, name: str, value: list[Any]) -> list[Message]:
        """The messages in a list that a column holds."""
        return self._reader(name).chat(value)

    def string(self, column: str) -> str:
        name, value = self.get(column)
        if not isinstance(value, str):
            raise self.wrong(name, value, "text")
        return value

    def items(self, column: str) -> tuple[str, list[Any]]:
        """The column's name and the list that it holds, or spells out."""
        name, value = self.get(column)
        if isinstance(value, str) and value.lstrip().startswith("["):
            try:
                value = written_out(value, self.reading.skipped)
            except ValueError:
                raise self.wrong(name, value, "a list, but this one is not valid JSON") from None
        if not isinstance(value, list):
            raise self.wrong(name, value, "a list")
        return name, value

    def numbers(self, column: str) -> list[float]:
        """A list of numbers, or a single one."""
        name, value = self.get(column)
        if isinstance(value, list) or (isinstance(value, str) and value.lstrip().startswith("[")):
            value = self.items(name)[1]
        return [self.number(name, each) for each in (value if isinstance(value, list) else [value])]

    def number(self, name: str, value: object) -> float:
        """A number that 32 bits can hold with room to spare, or its text, as in tables of text."""
        if isinstance(value, int | float | str) and not isinstance(value, bool):
            try:
                number = float(value)
            except (ValueError, OverflowError):
                number = math.nan
            if abs(number) < LARGEST:
                return number
        is_comma = isinstance(value, str) and re.fullmatch(r"[-+]?\d+,\d+", value.strip())
        raise self.wrong(name, value, "a number with a decimal point" if is_comma else "a finite number")

    def label(self, column: str) -> bool:
        name, value = self.get(column)
        value = _LABELS.get(value.strip().lower(), value) if isinstance(value, str) else value
        if value not in (True, False):  # 1 and 0 are equal to these
            raise self.wrong(name, value, "true or false")
        return bool(value)

    def inner(self, column: str) -> "Record":
        """The object in a column, as a separate record."""
        name, value = self.get(column)
        if not isinstance(value, dict):
            raise self.wrong(name, value, "an object")
        return Record(value, self.source, self.reading)

    def wrong(self, name: str, value: object, needed: str) -> DataError:
        return wrong_value(self.source, name, value, needed)

    def _text(self, name: str, value: object) -> Text:
        return self._reader(name).text(value)

    def _reader(self, name: str) -> MessageReader:
        return MessageReader(self.source, name, self.reading.unread, self.reading.skipped)


LARGEST = 1e30
"""The largest number that is read; differences of such numbers are finite in 32 bits."""

_LABELS = {
    **dict.fromkeys(("true", "1", "1.0", "yes", "good", "desirable"), True),
    **dict.fromkeys(("false", "0", "0.0", "no", "bad", "undesirable"), False),
}


def columns_of(record: Record) -> str:
    return listing(name for name, value in record.values.items() if value is not None) or "(none)"


def either(column: str) -> str:
    return column.replace("|", " or ")


def is_several(value: object) -> bool:
    """A list of texts, not a chat, which is a list of objects."""
    return isinstance(value, list) and not any(isinstance(each, dict) for each in value)

"""The types of a data set: raw records with checked getters, and rows of a prompt with its responses."""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from lit_align.errors import UserError, shown

Message = dict[str, Any]
"""{"role": …, "content": …} and the keys that a chat template may read: tool_calls, name, thinking, …

`content` is text; beside tool_calls it may be None.
"""
Text = str | list[Message]
"""A prompt: plain text, or a chat. A chat that ends with the assistant's message is continued (a prefill)."""
Answer = str | Message
"""A response: text (in a chat, the content of one assistant message), or an assistant's message with further keys."""
Kind = Literal["prompts", "preferences", "labelled", "texts"]


class DataError(UserError):
    """A data set that cannot be read. The message names the file, the row, what was found there, and the fix."""


@dataclass(frozen=True)
class Row:
    """One prompt and its responses."""

    prompt: Text
    responses: tuple[Answer, ...] = ()  # the chosen or the best one first
    rewards: tuple[float, ...] | None = None  # of each response
    labels: tuple[bool, ...] | None = None  # whether each response is desirable (KTO)
    source: str = ""  # "file.jsonl:17" or "name[split]:17"; rows are counted from 1
    tools: list[dict[str, Any]] | None = None  # the functions that the chat template may offer
    template_args: Mapping[str, Any] = field(default_factory=dict)  # further arguments of the chat template


def answer_text(answer: Answer) -> str:
    """The text of a response, without the further keys of its message."""
    return answer if isinstance(answer, str) else answer["content"] or ""


@dataclass(frozen=True)
class Rows:
    """The rows of a data set, and what was seen on the way."""

    rows: list[Row]
    format: str  # name of the detected format
    description: str  # one line for the screen
    skipped: Counter[str]  # what was left out or mended, by reason

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Row:
        return self.rows[place]


# --- a raw row ---


@dataclass(frozen=True)
class Record:
    """A raw row. Its getters raise a `DataError` that says what is wrong; `a|b` stands for either column."""

    values: Mapping[str, Any]
    source: str

    def has(self, column: str) -> bool:
        return any(self.values.get(name) is not None for name in column.split("|"))

    def get(self, column: str) -> tuple[str, Any]:
        """The column's name and its value."""
        for name in column.split("|"):
            if (value := self.values.get(name)) is not None:
                return name, value
        raise DataError(
            f"{self.source}: the row has no {either(column)}, as the first row has; its columns are "
            f"{columns_of(self)}. Fill it in, or take the row out."
        )

    def text(self, column: str) -> Text:
        return self._text(*self.get(column))

    def texts(self, column: str) -> list[Text]:
        """A list of texts, or a single one."""
        name, value = self.get(column)
        return [self._text(name, each) for each in value] if is_several(value) else [self._text(name, value)]

    def string(self, column: str) -> str:
        name, value = self.get(column)
        if not isinstance(value, str):
            raise self.wrong(name, value, "text")
        return value

    def numbers(self, column: str) -> list[float]:
        """A list of numbers, or a single one."""
        name, value = self.get(column)
        values = value if isinstance(value, list) else [value]
        for each in values:
            if isinstance(each, bool) or not isinstance(each, int | float) or not math.isfinite(each):
                raise self.wrong(name, each, "a finite number")
        return [float(each) for each in values]

    def label(self, column: str) -> bool:
        name, value = self.get(column)
        if value not in (True, False):  # 1 and 0 are equal to these
            raise self.wrong(name, value, "true or false")
        return bool(value)

    def inner(self, column: str) -> "Record":
        """The object in a column, as a record of its own."""
        name, value = self.get(column)
        if not isinstance(value, dict):
            raise self.wrong(name, value, "an object")
        return Record(value, self.source)

    def wrong(self, name: str, value: object, needed: str) -> DataError:
        return DataError(f"{self.source}: `{name}` holds {shown(value)}, but needs {needed}. Mend it or drop the row.")

    def _text(self, name: str, value: object) -> Text:
        if isinstance(value, str):
            return value
        if not isinstance(value, list) or not value:
            raise self.wrong(name, value, 'text, or messages like {"role": "user", "content": "…"}')
        return [self._message(name, each) for each in value]

    def _message(self, name: str, value: object) -> Message:
        if isinstance(value, dict):
            if value.get("tool_calls") or value.get("function_call"):
                raise Skip(TOOLS)
            role, content = value.get("role"), value.get("content")
            if isinstance(role, str) and isinstance(content, str):
                return {"role": role, "content": content}
        raise self.wrong(name, value, 'messages with text in both keys, like {"role": "user", "content": "…"}')


class Skip(Exception):
    """The row is left out, and counted under this reason."""


TOOLS = "rows with tools or tool calls, which are not read"


# --- words of messages ---


def listing(names: Iterable[str]) -> str:
    return ", ".join(names)


def columns_of(record: Record) -> str:
    return listing(name for name, value in record.values.items() if value is not None) or "(none)"


def either(column: str) -> str:
    return column.replace("|", " or ")


def first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def is_several(value: object) -> bool:
    """A list of texts, not a chat, which is a list of objects."""
    return isinstance(value, list) and all(isinstance(each, str | list) for each in value)

"""The types of a data set: rows of a prompt with its responses, and the account of how they were read."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from lit_align.errors import UserError

Message = dict[str, Any]
"""{"role": …, "content": …} and the keys that a chat template may read: tool_calls, name, thinking, …

`content` is text; beside tool_calls it may be None.
"""
Text = str | list[Message]
"""A prompt: plain text, or a chat. A chat that ends with the assistant's message is continued (a prefill)."""
Answer = str | Message
"""A response: text (in a chat, the content of one assistant message), or an assistant's message with further keys."""
Kind = Literal["prompts", "preferences", "labelled", "texts"]
Turns = Literal["all", "last"]


class DataError(UserError):
    """A data set that cannot be read. The message names the file, the row, the value found, and the fix."""


class Skip(Exception):
    """Raised to leave out a row, which is counted under this reason."""


@dataclass(frozen=True)
class Row:
    """One prompt and its responses."""

    prompt: Text
    responses: tuple[Answer, ...] = ()  # the chosen or the best one first
    rewards: tuple[float, ...] | None = None  # of each response
    labels: tuple[bool, ...] | None = None  # whether each response is desirable (KTO)
    cut: tuple[bool, ...] | None = None  # whether each response was cut at a limit, so that no end follows; None: no
    source: str = ""  # "file.jsonl:17" or "name[split]:17"; rows are counted from 1
    tools: list[dict[str, Any]] | None = None  # the functions that the chat template may offer
    template_args: Mapping[str, Any] = field(default_factory=dict)  # further arguments of the chat template
    is_new_turn: bool = False  # the responses are messages of their own, also after an assistant's message
    is_verbatim: bool = False  # the text spells out its special tokens: none is added at its beginning and end
    weight: float = 1.0  # in the loss and in all means
    columns: Mapping[str, Any] = field(default_factory=dict)  # all that the source has of the row, if it is asked for

    def of_responses(self, places: Sequence[int]) -> "Row":
        """The row with the responses at these places, in this order, and what belongs to each."""
        each = {name: getattr(self, name) for name in ("responses", "rewards", "labels", "cut")}
        kept: dict[str, Any] = {name: values and tuple(values[k] for k in places) for name, values in each.items()}
        return replace(self, **kept)


@dataclass(frozen=True)
class Rows:
    """The rows of a data set, and the account of reading them."""

    rows: Sequence[Row]
    format: str  # name of the detected format
    description: str  # one line for the screen
    skipped: Counter[str]  # rows left out or changed, by reason
    unread: tuple[str, ...] = ()  # columns, and keys of messages (messages[].id), that are not empty and not read

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, place: int) -> Row:
        return self.rows[place]


def answer_text(answer: Answer) -> str:
    """The text of a response, without the further keys of its message."""
    return answer if isinstance(answer, str) else answer["content"] or ""


def is_imitable(row: Row) -> bool:
    """Whether the row has a response to imitate; a part of a verbatim text may be white space."""
    return bool(row.responses) and (row.is_verbatim or not is_blank(row.responses[0]))


def is_blank(answer: Answer) -> bool:
    """Whether a response is empty: without text and without a further key such as tool_calls."""
    return not answer_text(answer).strip() and (isinstance(answer, str) or answer.keys() <= {"role", "content"})


def is_empty(value: object) -> bool:
    """Whether a column holds nothing that could be lost."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, dict):
        return all(is_empty(each) for each in value.values())
    if isinstance(value, list):
        return all(is_empty(each) for each in value)
    return value is None


def listing(names: Iterable[str]) -> str:
    return ", ".join(names)


def shortened(names: str, width: int = 160) -> str:
    """A list of names, cut after `width` characters."""
    if len(names) <= width:
        return names
    kept = names[:width].rpartition(", ")[0]
    return f"{kept}, … ({names.count(', ') - kept.count(', ')} more)"

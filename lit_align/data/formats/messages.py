"""Messages as data sets write them, and as chat templates read them.

    {"from": "human", "value": "Bird?"}  ──▶  {"role": "user", "content": "Bird?"}

Roles are brought to user, assistant, system, developer and tool where their meaning is clear; any other role is an
error. Keys that chat templates read are kept, other keys are reported as unread.
"""

import re
from collections import Counter
from typing import Any

from lit_align.data.formats.rows import Answer, DataError, Message, Text, is_empty, listing
from lit_align.data.formats.written_out import written_out
from lit_align.errors import shown

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
_CALLS = ("function_call", "tool_call")  # roles of ShareGPT and ms-swift: the content is the call, as JSON

KEPT = ("tool_calls", "tool_call_id", "name", "thinking", "reasoning_content", "reasoning", "tool_plan")
"""Keys of a message that chat templates read, beside role and content."""

_WANTED = 'messages with text in both keys, like {"role": "user", "content": "…"}'
_PLAIN = frozenset({"role", "content"})
_ROLE_KEYS = ("role", "from", "speaker")
_CONTENT_KEYS = ("content", "value", "text")
_WEIGHTS = ("weight", "loss", "train", "training")  # 0 or false: the turn is not trained on

_EXCHANGES = (
    ("user", "assistant"),
    ("human", "assistant"),
    ("input", "output"),
    ("prompt", "response"),
    ("question", "answer"),
    ("query", "response"),
    ("instruction", "output"),
)
"""Keys of a turn that holds a question with its answer."""

_DIALOGUES = ("messages", "conversations", "conversation", "dialog", "dialogue")
"""Columns in which a list of texts holds the turns of user and assistant, as in LIMA."""

_WRITTEN_OUT = re.compile(r"""\s*\[\s*\{\s*["'](role|content|from|value)["']\s*:""")
_ONE_WRITTEN_OUT = re.compile(r"""\s*\{\s*["'](role|content|from|value)["']\s*:""")
"""Beginnings of texts that spell out a list of messages, or one message."""

UNTRAINED = "_untrained"
"""Marks an assistant's message whose weight is 0, until its chat is split into turns."""


class MessageReader:
    """Reads the messages of one column of one row.

    Args:
        source: Names the row in messages.
        column: Name of the column.
        unread: Takes the names of keys that are not read.
        skipped: Counts the texts that are changed.
    """

    def __init__(self, source: str, column: str, unread: dict[str, None], skipped: Counter[str]):
        self.source, self.column, self.unread, self.skipped = source, column, unread, skipped

    def text(self, value: object) -> Text:
        """Plain text, or a chat of at least one message."""
        if isinstance(value, str):
            if _WRITTEN_OUT.match(value):
                return self.chat(self._parsed(value))
            return self.chat([one]) if (one := self._one_message(value)) else value
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
            return self.text(value[0])
        if self.column in _DIALOGUES and value and isinstance(value, list) and all(isinstance(v, str) for v in value):
            roles = ("user", "assistant")
            return [{"role": roles[place % 2], "content": each} for place, each in enumerate(value)]
        if isinstance(value, dict):
            self._check_object(value)
            value = [value]
        if not isinstance(value, list) or not value:
            raise self._wrong(value, 'text, or messages like {"role": "user", "content": "…"}')
        return self.chat(value)

    def _check_object(self, value: dict[str, Any]) -> None:
        """Name the way to a text in an object that is not a message."""
        texts = [f"`{self.column}.{key}`" for key, each in value.items() if isinstance(each, str)]
        if texts and value.keys().isdisjoint(_ROLE_KEYS):
            parts = f"part {texts[0]} is" if len(texts) == 1 else f"parts {listing(texts)} are"
            raise self._wrong(value, f"text or messages (its {parts} text)")

    def chat(self, value: list[Any]) -> list[Message]:
        return [message for each in value for message in self._messages(each)]

    def _messages(self, value: object) -> list[Message]:
        if not isinstance(value, dict):
            raise self._wrong(value, _WANTED)
        if value.keys() == _PLAIN and isinstance(value["content"], str) and str(value["role"]) in ROLES:  # read fast
            return [{"role": ROLES[value["role"]], "content": value["content"]}]
        role_key = next((key for key in _ROLE_KEYS if value.get(key) is not None), None)
        if role_key is None:
            return self._exchange(value)
        content_key = next((key for key in _CONTENT_KEYS if value.get(key) is not None), _CONTENT_KEYS[0])
        role, content = value[role_key], value.get(content_key)
        if any(isinstance(part, dict) and part.get("train") is False for part in value.get("train_detail") or []):
            raise self._wrong(value["train_detail"], "turns that are trained on as a whole (train: true or false)")
        known = {role_key, content_key, "function_call", *KEPT, *_WEIGHTS}
        self._note({key: each for key, each in value.items() if key not in known})
        if isinstance(role, str) and role.strip().lower() in _CALLS:
            return [{"role": "assistant", "content": None, "tool_calls": self._calls(content)}]
        message: Message = {"role": self._role(role), "content": self._content(content)} | self._kept(value)
        if message["content"] is None and "tool_calls" not in message:
            raise self._wrong(value, _WANTED)
        for key in _WEIGHTS:
            if value.get(key) not in (None, 0, 1):
                raise self._wrong(value[key], f"0 or 1 as a turn's {key} (a row's weight is the column `weight`)")
            if value.get(key) == 0:
                message[UNTRAINED] = True
        return [message]

    def _kept(self, value: dict[str, Any]) -> dict[str, Any]:
        """The further keys of a message that chat templates read."""
        kept = {key: value[key] for key in KEPT if not is_empty(value.get(key))}
        if "tool_calls" in kept:
            kept["tool_calls"] = self._objects("tool_calls", kept["tool_calls"])
        elif not is_empty(value.get("function_call")):
            kept["tool_calls"] = self._calls(value["function_call"])
        return kept

    def _exchange(self, value: dict[str, Any]) -> list[Message]:
        """A question with its answer in one object."""
        for question, answer in _EXCHANGES:
            if isinstance(value.get(question), str) and isinstance(value.get(answer), str):
                self._note({key: each for key, each in value.items() if key not in (question, answer)})
                return [
                    {"role": "user", "content": value[question]},
                    {"role": "assistant", "content": value[answer]},
                ]
        raise self._wrong(value, _WANTED)

    def _role(self, role: object) -> str:
        name = ROLES.get(role.strip().lower()) if isinstance(role, str) else None
        if name is None:
            raise DataError(
                f"{self.source}: a message in `{self.column}` has the role {shown(role)}, whose meaning is not known. "
                f"Change it to one of {listing(dict.fromkeys(ROLES.values()))}."
            )
        return name

    def _content(self, content: object) -> str | None:
        """Text; a list of text parts is joined."""
        if content is None or isinstance(content, str):
            return content
        if isinstance(content, list):
            texts = [part if isinstance(part, str) else self._part(part) for part in content]
            return "".join(texts)
        raise self._wrong(content, "text as a message's content")

    def _part(self, part: object) -> str:
        if isinstance(part, dict) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
            return part["text"]
        raise self._wrong(part, "text in every part of a message; images and sound are not read")

    def _calls(self, call: object) -> list[dict[str, Any]]:
        """Tool calls as chat templates read them, of a call, or a list of calls, in JSON."""
        calls = self._objects("function_call", call)
        if not all(isinstance(each.get("name"), str) for each in calls):
            raise self._wrong(call, 'a call like {"name": "…", "arguments": {…}}')
        return [{"type": "function", "function": each} for each in calls]

    def _objects(self, key: str, value: object) -> list[dict[str, Any]]:
        value = self._parsed(value) if isinstance(value, str) else value
        value = [value] if isinstance(value, dict) else value
        if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
            raise self._wrong(value, f"a list of objects in {key}")
        return value

    def _parsed(self, text: str) -> Any:
        try:
            return written_out(text, self.skipped)
        except ValueError:
            raise self._wrong(text, "messages, but this text, which looks like them, is not valid JSON") from None

    def _one_message(self, text: str) -> dict[str, Any] | None:
        """The message that a text spells out; None if it is an ordinary text."""
        if not _ONE_WRITTEN_OUT.match(text):
            return None
        try:
            value = written_out(text, self.skipped)
        except ValueError:
            return None
        is_message = isinstance(value, dict) and any(str(value.get(key)).lower() in ROLES for key in _ROLE_KEYS)
        return value if is_message and not value.keys().isdisjoint(_CONTENT_KEYS) else None

    def _note(self, others: dict[str, Any]) -> None:
        for key, value in others.items():
            if not is_empty(value):
                self.unread[f"{self.column}[].{key}"] = None

    def _wrong(self, value: object, needed: str) -> DataError:
        return wrong_value(self.source, self.column, value, needed)


def trained_turns(chat: list[Message]) -> tuple[list[Message], list[int]]:
    """The chat without marks, and the places of the assistant's messages that are trained on."""
    places = [place for place, each in enumerate(chat) if each["role"] == "assistant" and not each.get(UNTRAINED)]
    return without_marks(chat), places


def without_marks(chat: list[Message]) -> list[Message]:
    return [{key: value for key, value in each.items() if key != UNTRAINED} for each in chat]


def as_answer(message: Message) -> Answer:
    """The assistant's message as a response: its text, if it has no further key."""
    message = without_marks([message])[0]
    return message["content"] if message.keys() == {"role", "content"} else message


def wrong_value(source: str, column: str, value: object, needed: str) -> DataError:
    return DataError(
        f"{source}: `{column}` holds {shown(value)}, but needs {needed}. Correct it, take the row out, or read the "
        "column in another way with `columns`."
    )

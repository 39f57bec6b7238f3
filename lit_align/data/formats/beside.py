"""Columns beside prompt and responses that become part of the row: history, system message, tools and others."""

from dataclasses import replace
from typing import Any

from lit_align.data.formats.record import Record
from lit_align.data.formats.rows import DataError, Message, Row, Text, is_empty
from lit_align.data.formats.unread import occurs_in
from lit_align.data.formats.written_out import written_out
from lit_align.errors import shown

SYSTEM = "system|system_prompt|system_message"
HISTORY = "history"
PREFIX = "prefix|initial_reason_steps"
TEMPLATE_ARGS = "chat_template_kwargs|chat_template_args"
_TEMPLATE_ARGS_NAME = TEMPLATE_ARGS.partition("|")[0]
_RENDERING = ("conversation", "messages", "tools", "tokenize", "add_generation_prompt", "continue_final_message")
"""Arguments that rendering sets itself."""


def with_columns_beside(row: Row, record: Record, *, may_become_chat: bool) -> Row:
    """The row with the earlier turns, the system message, the beginning of the answer and the tools of its record.

    Args:
        may_become_chat: Whether a plain prompt becomes a user's turn if one of these columns needs a chat.
    """
    mapped = record.reading.mapped
    name = record.filled(HISTORY)
    if name and name not in record.read and (may_become_chat or isinstance(row.prompt, list)):
        turns = _history(record, name)
        row = replace(row, prompt=[*turns, *_chat(row.prompt, record, name)])
    row = _with_system(row, record, may_become_chat=may_become_chat or "system" in mapped)
    if name := record.filled(PREFIX):
        beginning = {"role": "assistant", "content": record.string(name)}
        row = replace(row, prompt=[*_chat(row.prompt, record, name), beginning], is_new_turn=False)
    if (name := record.filled("tools|functions")) and (isinstance(row.prompt, list) or "tools" in mapped):
        row = replace(row, prompt=_chat(row.prompt, record, name), tools=_objects(record, name))
    if (name := record.filled("documents")) and name in mapped:
        documents = {"documents": _objects(record, name)}
        row = replace(row, prompt=_chat(row.prompt, record, name), template_args=documents)
    if record.filled(TEMPLATE_ARGS):  # a plain prompt may become a chat when it is tokenized
        row = replace(row, template_args={**_template_args(record), **row.template_args})
    return row


def columns_beside(row: Row) -> dict[str, Any] | None:
    """Columns beside a prompt, from which `with_columns_beside` reads its tools and arguments again; None without."""
    columns = {"tools": row.tools, _TEMPLATE_ARGS_NAME: dict(row.template_args)}
    return {name: value for name, value in columns.items() if value} or None


def _template_args(record: Record) -> dict[str, Any]:
    """Arguments of the chat template in a column of their own, as in TRL."""
    name, value = record.get(TEMPLATE_ARGS)
    value = _object(value, record)
    if not isinstance(value, dict):
        raise record.wrong(name, value, "an object")
    if taken := [key for key in value if key in _RENDERING]:
        raise record.wrong(name, value, f"arguments of the chat template, which {taken[0]!r} is not")
    return {key: each for key, each in value.items() if not is_empty(each)}


def _chat(prompt: Text, record: Record, name: str) -> list[Message]:
    """The prompt as a chat, because of a column that only chats can have."""
    if isinstance(prompt, list):
        return prompt
    record.reading.chat_because_of = record.reading.chat_because_of or name
    return [{"role": "user", "content": prompt}]


def _history(record: Record, name: str) -> list[Message]:
    """Earlier turns: messages, or pairs of a question and its answer."""
    _, turns = record.items(name)
    if all(isinstance(turn, list) and len(turn) == 2 and all(isinstance(t, str) for t in turn) for turn in turns):
        turns = [{"user": question, "assistant": answer} for question, answer in turns]
    return record.chat(name, turns)


def _with_system(row: Row, record: Record, *, may_become_chat: bool) -> Row:
    """The row with the system message of a separate column at the beginning of its chat."""
    for name in SYSTEM.split("|"):
        value = record.values.get(name)
        if not isinstance(value, str) or not value.strip():
            continue
        is_first = name not in record.read  # not a later turn of the same chat
        record.read.add(name)
        if isinstance(row.prompt, str) and occurs_in(value.strip(), row.prompt):
            continue
        if isinstance(row.prompt, str) and not may_become_chat:
            raise DataError(
                f"{record.source}: `{name}` holds {shown(value)}, but the prompt is plain text, which has no system "
                f"message. Set columns={{system: {name}}} to read each prompt as a user's turn after it, or "
                f"ignore_columns=[{name}] to leave it out."
            )
        chat = _chat(row.prompt, record, name)
        if chat[0]["role"] not in ("system", "developer"):
            record.reading.skipped[f"chats now opened by their `{name}`"] += is_first
            row = replace(row, prompt=[{"role": "system", "content": value}, *chat])
        elif chat[0]["content"].strip() != value.strip():
            raise DataError(
                f"{record.source}: `{name}` holds {shown(value)}, but the chat opens with the system message "
                f"{shown(chat[0]['content'])}. Keep one of them."
            )
    return row


def _objects(record: Record, name: str) -> list[dict[str, Any]]:
    """A list of objects, or a single one; a table may hold the list or its objects as JSON."""
    _, value = record.get(name)
    whole = _object(value, record)
    objects = [_object(each, record) for each in (whole if isinstance(whole, list) else [whole])]
    if not all(isinstance(each, dict) for each in objects):
        is_text = any(isinstance(each, str) for each in objects)
        raise record.wrong(name, value, "a list of objects" + ", and a text in it is not valid JSON" * is_text)
    return objects


def _object(value: Any, record: Record) -> Any:
    """The value that a text spells out in JSON; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return written_out(value, record.reading.skipped)
    except ValueError:
        return value

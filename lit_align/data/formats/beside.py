"""Columns beside prompt and responses: they become part of the row, stop the run, or are reported as unread."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from lit_align.data.formats.messages import written_out
from lit_align.data.formats.record import Record
from lit_align.data.formats.rows import DataError, Kind, Message, Row, Text, answer_text, is_empty, listing
from lit_align.errors import shown

SYSTEM = "system|system_prompt|system_message"
QUESTIONS = "instruction|question|query|problem|input|context"
"""Columns that hold a prompt if none is named `prompt`."""
HISTORY = "history"
ANSWERS = "completion|response|output|answer|solution"
"""Columns that hold the one response to a prompt."""
TEMPLATE_ARGS = "chat_template_kwargs|chat_template_args"
_RENDERING = ("conversation", "messages", "tools", "tokenize", "add_generation_prompt", "continue_final_message")
OTHER_ITEMS = "[…]"
"""Ends the name of a column with the items of a list that no path of the user's mapping leads to."""
PREFIX = "prefix|initial_reason_steps"

_MEDIA = re.compile(r"(image|picture|photo|audio|video|sound|speech)s?(_(path|url|file|name|byte)s?)?", re.IGNORECASE)

_OF_JUDGES = re.compile(r"(labell?ing|judge|annotation|grading|scoring)_", re.IGNORECASE)
_THOUGHTS = re.compile(
    r"(\w+_)?(thinking|thoughts?|reasoning|rationale|cot|chain_of_thought)(_(trajector(y|ies)|contents?|steps|text))?",
    re.IGNORECASE,
)
"""Names of columns that hold thoughts, which belong before an answer that is imitated."""

_CONTEXT = frozenset(
    """
    prompt prompts input inputs context contexts document documents docs passage passages paragraph paragraphs article
    tools functions system system_prompt system_message history trajectory initial_reason_steps prefix dialog dialogs
    dialogue dialogues conversation conversations messages chat question questions query instruction instructions
    problem premise hypothesis background knowledge evidence facts schema preamble persona choices options
    quote quotes excerpt excerpts snippet snippets abstract table tables hint hints demonstrations constraints scenario
    """.split()  # noqa: SIM905  # one name a line would hide the code
)
"""Names of columns that usually belong to the prompt."""


# --- what becomes part of the row ---


def with_columns_beside(row: Row, record: Record, *, may_become_chat: bool) -> Row:
    """The row with the earlier turns, the system message, the beginning of the answer and the tools of its record.

    Args:
        may_become_chat: Whether a plain prompt becomes a user's turn if one of these columns needs a chat.
    """
    name = record.filled(HISTORY)
    if name and name not in record.read and (may_become_chat or isinstance(row.prompt, list)):
        turns = _history(record, name)
        row = replace(row, prompt=[*turns, *_chat(row.prompt, record, name)])
    row = _with_system(row, record, may_become_chat=may_become_chat or "system" in record.reading.mapped)
    if name := record.filled(PREFIX):
        beginning = {"role": "assistant", "content": record.string(name)}
        row = replace(row, prompt=[*_chat(row.prompt, record, name), beginning], is_new_turn=False)
    mapped = record.reading.mapped
    if (name := record.filled("tools|functions")) and (isinstance(row.prompt, list) or "tools" in mapped):
        row = replace(row, prompt=_chat(row.prompt, record, name), tools=_objects(record, name))
    if (name := record.filled("documents")) and name in mapped:
        documents = {"documents": _objects(record, name)}
        row = replace(row, prompt=_chat(row.prompt, record, name), template_args=documents)
    if isinstance(row.prompt, list) and record.filled(TEMPLATE_ARGS):
        row = replace(row, template_args={**_template_args(record), **row.template_args})
    return row


def _template_args(record: Record) -> dict[str, Any]:
    """Arguments of the chat template in a column of their own, as in TRL."""
    name, value = record.get(TEMPLATE_ARGS)
    value = _object(value)
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
        if isinstance(row.prompt, str) and _occurs_in(value.strip(), row.prompt):
            continue
        if isinstance(row.prompt, str) and not may_become_chat:
            raise DataError(
                f"{record.source}: `{name}` holds {shown(value)}, but the prompt is plain text, which has no system "
                f"message. Set columns={{system: {name}}} to read each prompt as a user's turn after it, or "
                f"ignore_columns=[{name}] to leave it out."
            )
        chat = _chat(row.prompt, record, name)
        if chat[0]["role"] not in ("system", "developer"):
            record.reading.skipped[f"chats that now open with their `{name}`"] += is_first
            row = replace(row, prompt=[{"role": "system", "content": value}, *chat])
        elif chat[0]["content"].strip() != value.strip():
            raise DataError(
                f"{record.source}: `{name}` holds {shown(value)}, but the chat opens with the system message "
                f"{shown(chat[0]['content'])}. Keep one of them."
            )
    return row


def _objects(record: Record, name: str) -> list[dict[str, Any]]:
    """A list of objects, or the JSON of one."""
    _, value = record.get(name)
    if isinstance(value, str):
        try:
            value = written_out(value)
        except ValueError:
            raise record.wrong(name, value, "a list of objects, and this text is not valid JSON") from None
    value = [value] if isinstance(value, dict) else value
    if isinstance(value, list):
        value = [_object(each) for each in value]
        if all(isinstance(each, dict) for each in value):
            return value
    raise record.wrong(name, value, "a list of objects")


def _object(value: Any) -> Any:
    """An object, also if a table holds it as JSON."""
    if not isinstance(value, str):
        return value
    try:
        return written_out(value)
    except ValueError:
        return value


# --- unread columns ---


def check_unread(row: Row, record: Record, kind: Kind, *, is_whole: bool) -> None:
    """Report unread columns; stop at a column that may belong to the prompt and is not repeated in the row.

    Args:
        is_whole: Whether the row is known to be complete, so that only images and sound can be missing.

    Raises:
        DataError: such a column is not empty; or the row is a text to imitate, and thoughts are in another column.
    """
    unread = {name: value for name, value in record.values.items() if name not in record.read and not is_empty(value)}
    _check_media(unread, record.source)
    for name, value in unread.items():
        is_chat = _is_chat(value) and not _OF_JUDGES.match(name) and not name.endswith(OTHER_ITEMS)
        belongs = _stem(name.lower().rpartition(".")[2]) in _CONTEXT or is_chat
        if belongs and not is_whole and not _is_repeated(value, row):
            raise DataError(
                f"{record.source}: `{name}` holds {shown(value)}, which may belong to the prompt, but nothing reads "
                f"it. {_advice(name, value, row, record)}, or leave it out with ignore_columns=[{name}]."
            )
        if kind == "texts" and not is_whole and _THOUGHTS.fullmatch(name) and not _is_repeated(value, row):
            raise DataError(
                f"{record.source}: `{name}` holds {shown(value)}, which may belong to the response, but nothing reads "
                f"it. {_advice_on_thoughts(name, value, record)} with ignore_columns=[{name}]."
            )
        record.reading.unread[name] = None


def _check_media(unread: Mapping[str, object], source: str) -> None:
    if media := [name for name, value in unread.items() if _MEDIA.fullmatch(_stem(name)) or _holds_bytes(value)]:
        holds, columns = ("holds", "column") if len(media) == 1 else ("hold", "columns")
        raise DataError(
            f"{source}: {listing(f'`{name}`' for name in media)} {holds} {shown(unread[media[0]])}, but images and "
            f"sound are not read. Leave the {columns} out with ignore_columns=[{listing(media)}] if the text is "
            "complete without."
        )


def _stem(name: str) -> str:
    """A column's name without its number: context_1, context2."""
    return re.sub(r"[_-]?\d+$", "", name)


def _advice_on_thoughts(name: str, value: object, record: Record) -> str:
    """How to put thoughts before the answer, if that is possible, or to leave them out."""
    answer = next((each for each in ANSWERS.split("|") if isinstance(record.values.get(each), str)), None)
    first = value[0] if isinstance(value, list) and value else value
    if answer is None or not isinstance(first, str):
        return "Leave it out"
    path = f"{name}.0" if isinstance(value, list) else name
    template = rf"<think>\n{{{path}}}\n</think>\n\n{{{answer}}}"
    prompt = _prompt_columns(record)
    before = f"prompt: {prompt[0]}, " if prompt and prompt != ["prompt"] else ""
    return f"Put it before the answer, for example with columns={{{before}completion: '{template}'}}, or leave it out"


def _advice(name: str, value: object, row: Row, record: Record) -> str:
    if name in ("tools", "functions", "documents"):
        chat = "" if isinstance(row.prompt, list) else ", which makes the prompt a user's turn"
        target = "documents" if name == "documents" else "tools"
        return f"Hand it to the chat template with columns={{{target}: {name}}}{chat}"
    prompt = _prompt_columns(record)
    if isinstance(value, list):
        if _is_chat(value) or not (prompt or "prompt" in record.reading.mapped):
            return f"If it holds earlier turns, read them with columns={{history: {name}}}"
        name = f"{name}.0"
    if not isinstance(value, str | list):
        keys = [key for key, each in value.items() if isinstance(each, str)] if isinstance(value, dict) else []
        name = f"{name}.{keys[0] if keys else '…'}"
    if "prompt" in record.reading.mapped:
        return f"Add {{{name}}} to the template in columns={{prompt: …}}"
    if prompt:
        parts = [*prompt, name] if name.startswith("input") else [name, *prompt]
        return f"Add it to the prompt, for example with columns={{prompt: '{template_of(parts)}'}}"
    if isinstance(value, str) and isinstance(row.prompt, list):
        return f"Read it as the system message with columns={{system: {name}}}"
    return f"Read it with columns={{prompt: {name}}}"


def _prompt_columns(record: Record) -> list[str]:
    """The columns of text that were read as the prompt."""
    return [
        name for name in ("prompt", *QUESTIONS.split("|")) if name in record.read and not _is_chat(record.values[name])
    ]


def template_of(names: Iterable[str]) -> str:
    return r"\n".join(f"{{{name}}}" for name in names)


def _is_repeated(value: object, row: Row) -> bool:
    """Whether the row contains each text of the value, as separate lines or as a long passage."""
    texts = [*([row.prompt] if isinstance(row.prompt, str) else row.prompt), *row.responses]
    joined = "\n".join(answer_text(each).strip() for each in texts)
    return all(_occurs_in(piece.strip(), joined) for piece in _texts_in(value))


def _occurs_in(piece: str, text: str) -> bool:
    """Whether a text contains a piece as separate lines, or a piece too long to be there by chance."""
    return f"\n{piece}\n" in f"\n{text}\n" or (len(piece) >= 40 and piece in text) or not piece


def _texts_in(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for each in value:
            yield from _texts_in(each)
    elif isinstance(value, dict):
        for key, each in value.items():
            if key not in ("role", "from", "speaker"):
                yield from _texts_in(each)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield str(value)


def _is_chat(value: object) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(each, dict) and not each.keys().isdisjoint(("role", "from")) for each in value)
    )


def _holds_bytes(value: object) -> bool:
    if isinstance(value, list):
        return any(map(_holds_bytes, value))
    if isinstance(value, dict):
        return any(map(_holds_bytes, value.values()))
    return isinstance(value, bytes)
